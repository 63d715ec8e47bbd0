"""Exact costs of a pruned network, from how many weights each tensor keeps, relative to the dense network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paretoprune.masks.units import WeightUnits
from paretoprune.objectives import Cost, Density, GroupCost

# A float32 number, and the bit of the mask that says whether a weight is kept.
NUMBER_BYTES, BIT_BYTES = 4.0, 1 / 8


@dataclass(frozen=True)
class Priced:
    """A network whose pruned versions have a cost.

    Attributes:
        network: The dense network, in evaluation mode; it is left as it is.
        units: Its prunable weights.
        image: One image (1, c, h, w) as it expects them.
    """

    network: nn.Module
    units: WeightUnits
    image: Tensor

    @property
    def n_other(self) -> int:
        """Parameters that are not prunable."""
        return sum(parameter.numel() for parameter in self.network.parameters()) - self.units.n_units


def density(priced: Priced) -> Cost:
    """Kept weights as a share of the prunable ones."""
    return Density()


def parameters(priced: Priced) -> Cost:
    """Number of kept weights and of all other parameters (biases, normalisation, excluded layers)."""
    return GroupCost("parameters", priced.units, np.ones(priced.units.n_groups), float(priced.n_other))


def macs(priced: Priced) -> Cost:
    """Multiply-accumulate operations of convolutions and linear layers for one image, without pruned weights."""
    uses = count_uses(priced.network, priced.image)
    prices = np.array([uses.pop(name, 0) for name in priced.units.names], dtype=np.float64)
    sizes = {name: parameter.numel() for name, parameter in priced.network.named_parameters()}
    return GroupCost("macs", priced.units, prices, float(sum(n * sizes[name] for name, n in uses.items())))


def stored_bytes(priced: Priced) -> Cost:
    """Bytes of a file with the kept weights, a bit for each prunable weight, and all other parameters and buffers."""
    n_buffers = sum(buffer.numel() for buffer in priced.network.buffers() if buffer.is_floating_point())
    fixed = NUMBER_BYTES * (priced.n_other + n_buffers) + BIT_BYTES * priced.units.n_units
    return GroupCost("bytes", priced.units, np.full(priced.units.n_groups, NUMBER_BYTES), fixed)


COSTS: Mapping[str, Callable[[Priced], Cost]] = {
    "density": density,
    "parameters": parameters,
    "macs": macs,
    "bytes": stored_bytes,
}


def count_uses(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Count how often one forward pass multiplies by each weight of a convolution or linear layer.

    Args:
        network: In evaluation mode; it is left as it is.
        image: One image (1, c, h, w).

    Returns:
        Multiplications by any one weight of a tensor, by parameter name. A tensor that several layers share, or whose
        layer runs several times, counts each time.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    uses: dict[str, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.get_parameter("weight")
        # A transposed convolution scatters from each input position, any other layer gathers for each output position.
        activations, channels = (
            (inputs[0], module.in_channels) if isinstance(module, _ConvTransposeNd) else (output, len(weight))
        )
        name = names[id(weight)]
        uses[name] = uses.get(name, 0) + activations.numel() // int(channels)

    layers = [module for module in network.modules() if isinstance(module, _ConvNd | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.inference_mode():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return uses


def make_costs(names: Sequence[str], priced: Priced) -> tuple[Cost, ...]:
    """Make the costs of the given names, in the same order.

    Raises:
        ValueError: A name is not one of `COSTS`.
    """
    unknown = [name for name in names if name not in COSTS]
    if unknown:
        raise ValueError(f"expected costs among {', '.join(COSTS)}, found {', '.join(unknown)}")
    return tuple(COSTS[name](priced) for name in names)
