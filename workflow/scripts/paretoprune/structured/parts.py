"""Units and the slices of tensors that go with them, and networks without some of them."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.copies import copied
from paretoprune.shapes import with_tensors

# Numbers of an axis that belong to no unit.
STAYS = -1


class NotCuttableError(ValueError):
    """Units cannot be cut; the message says why."""


@dataclass(frozen=True)
class Part:
    """An axis of a tensor whose entries go with units.

    Attributes:
        tensor: Name of the parameter or buffer.
        axis: The axis.
        unit_of: int64 (size of the axis,): the unit that each entry goes with, `STAYS` for none.
        reads: Whether it is a layer's weight by its inputs, so that the units' activations are read here.
        together: Whether it belongs to a layer that normalises all channels together.
    """

    tensor: str
    axis: int
    unit_of: np.ndarray
    reads: bool = False
    together: bool = False

    def stays(self, bits: np.ndarray) -> np.ndarray:
        """Which entries stay, bool (size of the axis,), for bits (n_units,)."""
        return np.asarray((self.unit_of == STAYS) | bits[self.unit_of])


@dataclass(frozen=True)
class Coupling:
    """Units that compete, and the slices of tensors that go with each.

    Attributes:
        name: Name of the layer that makes them.
        n_units: Number of units.
        parts: Everything that has to be cut.
        may_vanish: Whether the network still does something without any of them: they are a branch beside a shortcut.
    """

    name: str
    n_units: int
    parts: tuple[Part, ...]
    may_vanish: bool = False

    def is_named(self, pattern: str) -> bool:
        """Whether a shell pattern matches the name of a layer that has to be cut, or of its weight."""
        tensors = [part.tensor for part in self.parts if part.tensor.endswith("weight")]
        names = [self.name, *tensors, *(name.removesuffix(".weight") for name in tensors)]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)

    @property
    def is_normalised_together(self) -> bool:
        """Whether channels are normalised together, so that removing some changes the others."""
        return any(part.together for part in self.parts)


@dataclass(frozen=True)
class Couplings:
    """What can be cut of a network, and what cannot.

    Attributes:
        couplings: In the order in which the network runs.
        refused: Layers whose outputs cannot be cut, and why.
    """

    couplings: tuple[Coupling, ...]
    refused: Mapping[str, str]


def cut(
    network: nn.Module,
    couplings: Sequence[Coupling],
    kept: Mapping[str, np.ndarray],
    *,
    shares_tensors: bool = False,
) -> nn.Module:
    """A copy of a network without some units.

    Args:
        network: The whole network; it is left as it is.
        couplings: What can be cut.
        kept: By name of the coupling, bool (n_units,), which units stay; those that are not named stay whole.
        shares_tensors: Whether tensors of which nothing goes are those of the whole network, not copies.

    Returns:
        The same modules around smaller tensors; `shapes.Emptied` in the place of layers that make or read nothing.
    """
    return with_tensors(copied(network, shares_tensors=shares_tensors), smaller_tensors(network, couplings, kept))


def smaller_tensors(
    network: nn.Module, couplings: Sequence[Coupling], kept: Mapping[str, np.ndarray]
) -> dict[str, Tensor | None]:
    """The tensors that change when units go, by name; None for those of which nothing is left."""
    tensors: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    # An axis may be cut by several couplings, whose entries are side by side in it (concatenations).
    stays: dict[str, dict[int, np.ndarray]] = {}
    reads: set[tuple[str, int]] = set()
    for coupling in couplings:
        if coupling.name not in kept or kept[coupling.name].all():
            continue
        for part in coupling.parts:
            mine, axes = part.stays(kept[coupling.name]), stays.setdefault(part.tensor, {})
            axes[part.axis] = axes[part.axis] & mine if part.axis in axes else mine
            if part.reads:
                reads.add((part.tensor, part.axis))
    smaller: dict[str, Tensor | None] = {}
    for name, axes in stays.items():
        cut_out = tensors[name].detach()
        for axis, mask in axes.items():
            cut_out = cut_out.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(cut_out.device))
        smaller[name] = cut_out if cut_out.numel() else None
    for name, held in list(smaller.items()):
        bias = f"{name.removesuffix('weight')}bias"
        makes = next((mask for axis, mask in stays[name].items() if (name, axis) not in reads), None)
        if held is None and (makes is None or makes.any()) and name.endswith("weight"):
            # It reads nothing, and what it made of nothing is its bias.
            n_made = tensors[name].shape[1 if (name, 0) in reads else 0] if makes is None else int(makes.sum())
            trained = smaller.get(bias, tensors.get(bias))
            smaller[bias] = tensors[name].new_zeros(n_made) if trained is None else trained.detach()
    return smaller
