"""Small networks, data and naive references that several tests share."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups
from paretoprune.networks.architectures import CifarResNet
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

# Convolutions on 8x8 images gain nothing from threads, and sums in a fixed order make equal runs equal.
torch.set_num_threads(1)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
RESNET20 = SHARED_DATA / "checkpoints" / "resnet20-12fca82f.th"
CIFAR_SAMPLE = SHARED_DATA / "cifar10-sample.tar"
# What the published checkpoints were trained with.
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Foreign(nn.Module):
    """A classifier of 8x8 grey images that is nothing like the project's own.

    Biases, grouped and depthwise convolutions, a transposed and a one-dimensional one, batch norm (2-d and 1-d) after
    some layers only, and one weight that two layers share.
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.grouped_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.line = nn.Conv1d(6, 24, 8, stride=8)
        self.line_norm = nn.BatchNorm1d(24)
        self.first = nn.Linear(24, 24)
        self.second = nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8 * 24, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.grouped_norm(self.grouped(x)) + self.depthwise(x))
        x = functional.relu(self.up(functional.relu(self.down(x))))
        x = functional.relu(self.line_norm(self.line(x.flatten(2)))).transpose(1, 2)
        x = functional.relu(self.first(x))
        x = functional.relu(self.second(x))
        return self.head(x.flatten(1))


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: float32 (1797, 1, 8, 8), about standardised, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return (images - 0.3) / 0.37, torch.from_numpy(found.target).long()


def fit(network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int = 0) -> nn.Module:
    """Train in place by plain Adam, without the project's own loop."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimiser.zero_grad()
            functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimiser.step()
    optimiser.zero_grad()
    return network.eval()


@lru_cache
def residual() -> nn.Module:
    """A trained ResNet-8 of digits with blocks of 8, 16 and 32 channels; tests copy it before they change it."""
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CifarResNet(8, 10, 1, base_width=8)
    return fit(network, images[:1000], labels[:1000], epochs=6)


def fresh(kind: str, n_classes: int = 10, seed: int = 0) -> nn.Module:
    """An untrained network, `residual` or `foreign`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CifarResNet(8, n_classes, 1, base_width=6) if kind == "residual" else Foreign(n_classes)


@lru_cache
def _trained(kind: str) -> nn.Module:
    images, labels = digits()
    return fit(fresh(kind), images[:1000], labels[:1000], epochs=6)


def trained(kind: str) -> nn.Module:
    """A copy of a network (`residual` or `foreign`) trained on the first thousand digits."""
    return copy.deepcopy(_trained(kind))


def magnitude_mask(network: nn.Module, layout: WeightUnits, density: float) -> np.ndarray:
    """bool (n_weights,): the same density in every layer, the largest weights kept."""
    parameters = dict(network.named_parameters())
    sizes = np.abs(layout.flatten({name: parameters[name].detach().numpy() for name in layout.names}))
    return keep_top(ranks_within_groups(sizes, layout), np.rint(density * layout.sizes).astype(int).tolist(), layout)


def some_masks(network: nn.Module, exclude: Sequence[str] = ()) -> PackedMasks:
    """All, nothing, random, and by magnitude, and one with a whole tensor gone."""
    layout, rng = WeightUnits.of(network, exclude), np.random.default_rng(7)
    rows = [np.ones(layout.n_weights, dtype=bool), np.zeros(layout.n_weights, dtype=bool)]
    rows += [rng.random(layout.n_weights) < density for density in (0.9, 0.5)]
    rows += [magnitude_mask(network, layout, density) for density in (0.6, 0.3, 0.1)]
    without_one = magnitude_mask(network, layout, 0.7)
    without_one[layout.offsets[1] : layout.offsets[2]] = False
    return PackedMasks.pack(np.array([*rows, without_one]))


def calibration() -> Tensor:
    """Images that pruned networks are repaired on."""
    return digits()[0][:200]


def _inputs_of(network: nn.Module, layer: nn.Module) -> Tensor | None:
    """What a layer is given when it first runs on the calibration images, in float64 (channels, everything else).

    None if the network never runs it.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        network(calibration())
    handle.remove()
    return seen[0].double().transpose(0, 1).flatten(1) if seen else None


def naive_network(network: nn.Module, mask: np.ndarray, repair: str, exclude: Sequence[str] = ()) -> nn.Module:
    """Multiply by the mask, then correct one batch norm after the other, each from a forward pass of its own.

    The order in which the network defines its batch norms must be the one in which it runs them.
    """
    pruned = copy.deepcopy(network)
    parameters = dict(pruned.named_parameters())
    for name, part in WeightUnits.of(network, exclude).split(mask).items():
        parameters[name].data *= torch.from_numpy(part)
    if repair == "none":
        return pruned
    for dense, layer in zip(network.modules(), pruned.modules(), strict=True):
        if isinstance(layer, _BatchNorm) and isinstance(dense, _BatchNorm) and layer.running_mean is not None:
            assert layer.running_var is not None
            before, after = _inputs_of(network, dense), _inputs_of(pruned, layer)
            if before is None or after is None:
                continue
            ratio = after.var(1, correction=0) / before.var(1, correction=0)
            shift = layer.running_mean.double() - before.mean(1)
            layer.running_mean.copy_(after.mean(1) + shift * ratio.sqrt())
            layer.running_var.copy_(layer.running_var.double() * ratio)
    return pruned


def n_hooks(network: nn.Module) -> int:
    """Hooks on any module of a network."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in network.modules())


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same keys and the same values, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def numpy_state() -> list[int]:
    """numpy's global random state, which nothing here may touch."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return [*state["state"]["key"].tolist(), state["state"]["pos"]]
