"""Coupled channels and heads as the units of a search, the small network of a mask, and what it costs."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from paretoprune.copies import copied
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units, WeightUnits
from paretoprune.networks.costs import NUMBER_BYTES, count_uses
from paretoprune.networks.watching import run_watched
from paretoprune.objectives import Cost
from paretoprune.shapes import is_depthwise
from paretoprune.structured.coupling import find_couplings
from paretoprune.structured.parts import Coupling, cut

# Layers that a report has lines for.
N_NAMED = 3


@dataclass(frozen=True)
class ChannelUnits(Units):
    """Units that can be cut out of a network: a group is a coupling, a unit a channel of it with all that hangs on it.

    Attributes:
        couplings: In the order in which the network runs.
        refused: Layers whose outputs cannot be cut, and why.
    """

    couplings: tuple[Coupling, ...]
    refused: Mapping[str, str]

    @classmethod
    def of(
        cls, network: nn.Module, image: Tensor, exclude: Sequence[str] = (), *, strict: bool = True
    ) -> "ChannelUnits":
        """The units of a network.

        Args:
            network: In evaluation mode.
            image: One image (1, ...), normalised.
            exclude: Shell patterns of layers, or of their weights, that stay whole.
            strict: Whether a pattern has to match a layer that could be cut.

        Raises:
            ValueError: The network's graph cannot be followed, nothing can be cut, or a pattern matches nothing.
        """
        found = find_couplings(network, image)
        excluded: set[str] = set()
        for pattern in exclude:
            matched = {one.name for one in found.couplings if one.is_named(pattern)}
            if strict and not matched:
                raise ValueError(
                    f"exclude pattern '{pattern}' matches none of the layers whose channels can be cut "
                    f"({', '.join(one.name for one in found.couplings)}); correct or remove it"
                )
            excluded |= matched
        kept = tuple(one for one in found.couplings if one.name not in excluded)
        if not kept:
            raise ValueError(f"expected channels to cut, found none outside exclude={list(exclude)}; exclude less")
        return cls(kept, found.refused)

    def report(self, log: logging.Logger) -> None:
        """Say how much of a network can be cut, and what cannot."""
        n_branches = sum(coupling.may_vanish for coupling in self.couplings)
        branches = f", of which {n_branches} are branches that may vanish" if n_branches else ""
        log.info("%d channels and heads in %d groups can be cut%s", self.n_units, self.n_groups, branches)
        for name, reason in list(self.refused.items())[:N_NAMED]:
            log.info("the channels of %s stay: %s", name, reason)
        if len(self.refused) > N_NAMED:
            log.info("so do those of %d other layers", len(self.refused) - N_NAMED)

    @cached_property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the couplings."""
        return tuple(coupling.name for coupling in self.couplings)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of units of each coupling, int64 (n_groups,)."""
        return np.array([coupling.n_units for coupling in self.couplings], dtype=np.int64)

    def split(self, bits: np.ndarray) -> dict[str, np.ndarray]:
        """Bits (n_units,) by coupling."""
        return {
            name: bits[start:stop]
            for name, start, stop in zip(self.names, self.offsets[:-1], self.offsets[1:], strict=True)
        }

    def slim(self, network: nn.Module, bits: np.ndarray) -> nn.Module:
        """The smaller network that keeps the units of a mask.

        Args:
            network: The whole network; it is left as it is.
            bits: bool (n_units,).
        """
        return cut(network, self.couplings, self.split(bits))

    def keeping_branches(self) -> "ChannelUnits":
        """The same units, of which no group may vanish."""
        return replace(self, couplings=tuple(replace(one, may_vanish=False) for one in self.couplings))

    def can_be_built(self, masks: PackedMasks) -> np.ndarray:
        """Which masks leave a network that works, bool (n_masks,): only branches beside a shortcut may vanish."""
        may_vanish = np.array([coupling.may_vanish for coupling in self.couplings])
        return np.asarray(((self.n_kept(masks) > 0) | may_vanish).all(axis=1))


class Sizes:
    """How large the tensors of a network are, as a function of masks.

    Args:
        units: What is cut.
        network: The whole network.
    """

    def __init__(self, units: ChannelUnits, network: nn.Module) -> None:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.units = units
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.floats = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.parameters = {name for name, _ in network.named_parameters()}
        self._axes: dict[tuple[str, int], int] = {}
        # Weights by the axis of their inputs, of layers without a bias.
        self._reading = [
            (part.tensor, part.axis)
            for coupling in units.couplings
            for part in coupling.parts
            if part.reads and f"{part.tensor.removesuffix('weight')}bias" not in tensors
        ]
        rows: list[int] = []
        columns: list[np.ndarray] = []
        for coupling, start in zip(units.couplings, units.offsets[:-1], strict=True):
            for part in coupling.parts:
                row = self._axes.setdefault((part.tensor, part.axis), len(self._axes))
                mine = part.unit_of[part.unit_of >= 0] + start
                rows += [row] * len(mine)
                columns.append(mine)
        shape = len(self._axes), units.n_units
        # How many entries of an axis go with a unit.
        self._lost = csr_array((np.ones(len(rows)), (np.array(rows), np.concatenate(columns))), shape=shape)

    def kept(self, masks: PackedMasks) -> dict[tuple[str, int], np.ndarray]:
        """Entries that each axis keeps, float64 (n_masks,), by tensor and axis; of axes that are cut."""
        dropped = np.array([~masks.unpack(i) for i in range(len(masks))], dtype=np.float64).reshape(len(masks), -1)
        lost = (self._lost @ dropped.T) if len(masks) else np.zeros((len(self._axes), 0))
        return {(name, axis): self.shapes[name][axis] - lost[row] for (name, axis), row in self._axes.items()}

    def constants(self, kept: Mapping[tuple[str, int], np.ndarray]) -> Any:
        """Numbers in biases that layers have since they read nothing, float64 (n_masks,), see `shapes.Emptied`."""
        total: Any = 0.0
        for name, axis in self._reading:
            made = kept.get((name, 1 - axis), float(self.shapes[name][1 - axis]))
            total = total + (kept[name, axis] == 0) * made
        return total

    def of_tensor(self, name: str, kept: Mapping[tuple[str, int], np.ndarray]) -> Any:
        """Numbers that a tensor keeps, float64 (n_masks,), or one number if it is never cut."""
        size: Any = 1.0
        for axis, n in enumerate(self.shapes[name]):
            size = size * kept.get((name, axis), float(n))
        return size


@dataclass(frozen=True)
class SlimCost:
    """A cost of the small network, relative to the whole one.

    Attributes:
        name: Name of the objective.
        sizes: How large its tensors are.
        amount: From what `Sizes.kept` says to the cost in its own unit, float64 (n_masks,).
    """

    name: str
    sizes: Sizes
    amount: Callable[[Mapping[tuple[str, int], np.ndarray]], np.ndarray]

    def of(self, masks: PackedMasks) -> np.ndarray:
        """Relative costs, float64 (n_masks,)."""
        amounts = np.asarray(self.amount(self.sizes.kept(masks)), dtype=np.float64)
        return np.broadcast_to(amounts, (len(masks),)) / self.whole

    @cached_property
    def whole(self) -> float:
        """The cost of the whole network, in its own unit."""
        everything = PackedMasks.pack_each([np.ones(self.sizes.units.n_units, dtype=bool)], self.sizes.units.n_units)
        return float(np.ravel(self.amount(self.sizes.kept(everything)))[0])


def density(sizes: Sizes, network: nn.Module, image: Tensor) -> SlimCost:
    """Numbers in the weights that could be pruned one by one (`masks.units.WeightUnits`)."""
    names = WeightUnits.of(network).names
    return SlimCost("density", sizes, lambda kept: sum(sizes.of_tensor(name, kept) for name in names))


def parameters(sizes: Sizes, network: nn.Module, image: Tensor) -> SlimCost:
    """Numbers in all parameters."""

    def amount(kept: Mapping[tuple[str, int], np.ndarray]) -> np.ndarray:
        return np.asarray(sizes.constants(kept) + sum(sizes.of_tensor(name, kept) for name in sizes.parameters))

    return SlimCost("parameters", sizes, amount)


def macs(sizes: Sizes, network: nn.Module, image: Tensor) -> SlimCost:
    """Multiply-adds of one image with all weights of layers (`networks.costs.count_uses`)."""
    uses = count_uses(network, image)
    return SlimCost("macs", sizes, lambda kept: sum(n * sizes.of_tensor(name, kept) for name, n in uses.items()))


def stored_bytes(sizes: Sizes, network: nn.Module, image: Tensor) -> SlimCost:
    """Bytes of a file with all parameters and buffers."""

    def amount(kept: Mapping[tuple[str, int], np.ndarray]) -> np.ndarray:
        numbers = sizes.constants(kept) + sum(sizes.of_tensor(name, kept) for name in sizes.floats)
        return np.asarray(NUMBER_BYTES * numbers)

    return SlimCost("bytes", sizes, amount)


def memory(sizes: Sizes, network: nn.Module, image: Tensor) -> SlimCost:
    """The most activations that a convolution or linear layer has to hold, its inputs and outputs, for one image.

    Attention's layers count, the products of queries and keys do not.
    """
    held = _activations(network, image)

    def amount(kept: Mapping[tuple[str, int], np.ndarray]) -> np.ndarray:
        each = []
        for name, (n_in, n_out, depthwise) in held.items():
            shape = sizes.shapes[name]
            made = kept.get((name, 0), float(shape[0])) / shape[0]
            read = made if depthwise else kept.get((name, 1), float(shape[1])) / shape[1]
            each.append(n_in * read + n_out * made)
        return np.asarray(np.max(np.broadcast_arrays(*each), axis=0))

    return SlimCost("memory", sizes, amount)


def _activations(network: nn.Module, image: Tensor) -> dict[str, tuple[int, int, bool]]:
    """What each layer is given and makes for one image, by the name of its weight, and whether it is depthwise."""
    held: dict[str, tuple[int, int, bool]] = {}

    def see(name: str, layer: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any], output: Any) -> None:
        if isinstance(layer, nn.MultiheadAttention):
            # Its two layers are never called.
            n_tokens = output[0].numel() // output[0].shape[-1]
            for own, weight in (("in_proj_weight", layer.in_proj_weight), ("out_proj.weight", layer.out_proj.weight)):
                if weight is not None:
                    held[f"{name}.{own}".removeprefix(".")] = *(n_tokens * n for n in reversed(weight.shape)), False
        else:
            held[f"{name}.weight".removeprefix(".")] = inputs[0].numel(), output.numel(), is_depthwise(layer)

    run_watched(network, image, lambda module: isinstance(module, _ConvNd | nn.Linear | nn.MultiheadAttention), see)
    return held


SLIM_COSTS: Mapping[str, Callable[[Sizes, nn.Module, Tensor], Cost]] = {
    "density": density,
    "parameters": parameters,
    "macs": macs,
    "bytes": stored_bytes,
    "memory": memory,
}


def slim_costs(
    names: Sequence[str], units: ChannelUnits, network: nn.Module, image: Tensor, measured: Sequence[Cost] = ()
) -> tuple[Cost, ...]:
    """Make the costs of the given names, in the same order.

    Args:
        names: Among `SLIM_COSTS` and the names of `measured`.
        units: What is cut.
        network: The whole network, in evaluation mode.
        image: One image (1, ...), normalised.
        measured: Costs that are of a machine rather than of a network alone, see `structured.latency`.

    Raises:
        ValueError: A name is none of these.
    """
    known = {cost.name: cost for cost in measured}
    if unknown := [name for name in names if name not in SLIM_COSTS and name not in known]:
        raise ValueError(f"expected costs among {', '.join((*SLIM_COSTS, *known))}, found {', '.join(unknown)}")
    whole = copied(network)
    sizes = Sizes(units, whole)
    return tuple(known[name] if name in known else SLIM_COSTS[name](sizes, whole, image) for name in names)
