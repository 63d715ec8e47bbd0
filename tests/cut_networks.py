"""Networks of torchvision and timm, as the tests and the survey of docs/channels-networks.md build and cut them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from paretoprune.networks.costs import count_uses
from paretoprune.structured.parts import Coupling
from paretoprune.structured.units import ChannelUnits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

# As in `small_networks`: small layers gain nothing from threads.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Shape:
    """The smallest images that a kind of network takes.

    Attributes:
        size: Pixels along a side.
        options: What the constructor has to be told.
    """

    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


# By the beginning of the name; the longest that fits.
SHAPES: Mapping[str, Shape] = {
    "": Shape(),
    "googlenet": Shape(64, {"init_weights": False}),
    "inception_v3": Shape(80, {"init_weights": False}),
    "maxvit_t": Shape(224),
    "vit_": Shape(64, {"image_size": 64}),
    "timm/vit": Shape(64, {"img_size": 64}),
    "timm/beit": Shape(64, {"img_size": 64}),
    "timm/eva": Shape(56, {"img_size": 56}),
    "timm/swin": Shape(64, {"img_size": 64}),
    "timm/mixer": Shape(64, {"img_size": 64}),
    "timm/gmlp": Shape(64, {"img_size": 64}),
    "timm/levit": Shape(224),
    "timm/maxvit": Shape(64, {"img_size": 64}),
    "timm/xcit": Shape(64, {"img_size": 64}),
}


def shape_of(name: str) -> Shape:
    """What images a network takes."""
    return SHAPES[max((start for start in SHAPES if name.startswith(start)), key=len)]


def build(name: str, n_classes: int = 10) -> nn.Module:
    """An untrained network of torchvision, or of timm where the name says so, in which nothing is 0 or 1 by chance."""
    options = dict(shape_of(name).options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name.startswith("timm/"):
            import timm

            network = timm.create_model(name.removeprefix("timm/"), num_classes=n_classes, **options)
        else:
            network = models.get_model(name, weights=None, num_classes=n_classes, **options)
    return awake(network)


def awake(network: nn.Module) -> nn.Module:
    """The same network in evaluation mode, in place, without parameters and statistics that are all 0 or all 1.

    Scales of layers, gates and branches that start at 0 would hide what they are multiplied with, and so would weights
    that start so small that hardly anything passes.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1 or float(parameter.max()) == float(parameter.min()):
                parameter.add_(0.1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif float(parameter.std()) < 0.5 * (wide := parameter[0].numel() ** -0.5):
                parameter.mul_(wide / parameter.std())
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.linspace(-0.2, 0.2, module.num_features))
                module.running_var.copy_(torch.linspace(0.7, 1.4, module.num_features))
    return network.eval()


def images_of(name: str, n: int = 1) -> Tensor:
    """Noise (n, 3, size, size)."""
    size = shape_of(name).size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def shares_in_groups(network: nn.Module, units: ChannelUnits, image: Tensor) -> tuple[float, float]:
    """Shares of the multiply-adds, and of all parameters, in tensors that some group cuts."""
    cut = {part.tensor for one in units.couplings for part in one.parts}
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    macs = {name: n * sizes[name] for name, n in count_uses(network, image).items()}
    return (
        sum(n for name, n in macs.items() if name in cut) / sum(macs.values()),
        sum(n for name, n in sizes.items() if name in cut) / sum(sizes.values()),
    )


def some_bits(units: ChannelUnits, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """A random mask that leaves something of each group."""
    bits = np.random.default_rng(seed).random(units.n_units) < share
    bits[units.offsets[:-1]] = True
    return bits


def without_norms_of_all(units: ChannelUnits, bits: np.ndarray) -> np.ndarray:
    """The same mask, with all units of groups that are normalised together."""
    bits = bits.copy()
    for one, start, stop in zip(units.couplings, units.offsets[:-1], units.offsets[1:], strict=True):
        bits[start:stop] |= one.is_normalised_together
    return bits


def silenced(network: nn.Module, couplings: tuple[Coupling, ...], kept: Mapping[str, np.ndarray]) -> nn.Module:
    """The whole network, in place, with the weights set to 0 that read what is not kept."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for one in couplings:
            for part in one.parts:
                if part.reads:
                    gone = torch.from_numpy(np.flatnonzero(~part.stays(kept[one.name])))
                    parameters[part.tensor].index_fill_(part.axis, gone, 0.0)
    return network


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
