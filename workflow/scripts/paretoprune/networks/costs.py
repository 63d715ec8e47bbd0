"""What a pruned network costs, as a function of how many weights each tensor keeps; relative to the dense network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence

from paretoprune.attention import PlainAttention
from paretoprune.masks.units import WeightUnits, prunable_parameters
from paretoprune.networks.watching import run_watched
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
    """Multiply-adds of one image with all weights of layers (`count_uses`), without those of pruned weights."""
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


def count_uses(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Count how often one forward pass multiplies by each prunable weight (`masks.units.prunable_parameters`).

    Args:
        network: In evaluation mode; it is left as it is.
        image: One image (1, c, h, w).

    Returns:
        Multiplications by any one weight of a tensor, by parameter name. A tensor that several layers share, or whose
        layer runs several times, counts each time. Where the weights of a tensor are used unequally often (attention
        over another sequence), it is their mean.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    uses: dict[str, float] = {}

    def count(_: str, module: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any], output: Any) -> None:
        for own_name, n in _uses_of_layer(module, inputs, options, output).items():
            name = names[id(module.get_parameter(own_name))]
            uses[name] = uses.get(name, 0) + n

    run_watched(network, image, prunable_parameters, count)
    return uses


def count_macs(network: nn.Module, image: Tensor) -> float:
    """Multiply-adds of one image with all weights of layers, see `count_uses`."""
    parameters = dict(network.named_parameters())
    return sum(n * parameters[name].numel() for name, n in count_uses(network, image).items())


def _uses_of_layer(
    module: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any], output: Any
) -> dict[str, float]:
    """Count how often one call of a layer multiplies by each weight of its tensors, by their names in the layer."""
    if isinstance(module, nn.MultiheadAttention):
        query, key = (inputs[i] if len(inputs) > i else options[name] for i, name in enumerate(("query", "key")))
        n_query, n_key = query.numel() // query.shape[-1], key.numel() // key.shape[-1]
        counts = {"q_proj_weight": n_query, "k_proj_weight": n_key, "v_proj_weight": n_key}
        # The projection of the output is no layer that is called: attention uses its weights directly.
        counts |= {"in_proj_weight": (n_query + 2 * n_key) / 3, "out_proj.weight": n_query}
        names = set(dict(module.named_parameters()))
        if isinstance(module, PlainAttention):
            names.remove("out_proj.weight")  # that one calls it
        return {name: n for name, n in counts.items() if name in names}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        sequence = inputs[0].data if isinstance(inputs[0], PackedSequence) else inputs[0]
        n_steps = sequence.numel() // sequence.shape[-1]
        return dict.fromkeys(prunable_parameters(module), n_steps)
    if isinstance(module, _ConvTransposeNd):
        # A transposed convolution scatters from each input position, other layers gather for each output position.
        return {"weight": inputs[0].numel() // module.in_channels}
    return {"weight": output.numel() // len(module.get_parameter("weight"))}


def make_costs(names: Sequence[str], priced: Priced) -> tuple[Cost, ...]:
    """Make the costs of the given names, in the same order.

    Raises:
        ValueError: A name is not one of `COSTS`.
    """
    unknown = [name for name in names if name not in COSTS]
    if unknown:
        raise ValueError(f"expected costs among {', '.join(COSTS)}, found {', '.join(unknown)}")
    return tuple(COSTS[name](priced) for name in names)
