"""Units: what a mask keeps or removes as a whole, in groups.

A unit is for instance a weight. A group is a set of units that scores can compare, for instance a layer. Phase 1
searches one threshold for each group, Phase 2 one bit for each unit. The search knows nothing else about a network.
"""

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from paretoprune.masks.packed import PackedMasks

if TYPE_CHECKING:
    from torch import nn


class Units(ABC):
    """Units in groups; the units of a group lie side by side in a mask.

    Attributes:
        names: Names of the groups, in the order of the mask.
    """

    names: tuple[str, ...]

    @property
    @abstractmethod
    def sizes(self) -> np.ndarray:
        """Number of units of each group, int64 (n_groups,)."""

    @cached_property
    def offsets(self) -> np.ndarray:
        """Start of each group in a mask and, last, its end; int64 (n_groups + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def n_units(self) -> int:
        """Number of units, which is the number of bits of a mask."""
        return int(self.offsets[-1])

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.names)

    @cached_property
    def group_of(self) -> np.ndarray:
        """Index of each unit's group, int32 (n_units,)."""
        return np.repeat(np.arange(self.n_groups, dtype=np.int32), self.sizes)

    def n_kept(self, masks: PackedMasks) -> np.ndarray:
        """Number of kept units per mask and group, int64 (n_masks, n_groups)."""
        counts = [np.add.reduceat(masks.unpack(i), self.offsets[:-1], dtype=np.int64) for i in range(len(masks))]
        return np.array(counts, dtype=np.int64).reshape(len(masks), self.n_groups)


@dataclass(frozen=True)
class PlainUnits(Units):
    """Units without further properties, for problems without networks.

    Attributes:
        names: Names of the groups.
        counts: Number of units of each group, at least 1.

    Raises:
        ValueError: There is no group, a group without units, or not one count for each name.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.counts) or not self.counts or min(self.counts) < 1:
            raise ValueError(
                f"expected a name and a positive number of units for each group, found {len(self.names)} names and "
                f"the counts {list(self.counts)}; leave empty groups out"
            )

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of units of each group, int64 (n_groups,)."""
        return np.array(self.counts, dtype=np.int64)


@dataclass(frozen=True)
class WeightUnits(Units):
    """The prunable weights of a network: a unit is a weight, a group is a tensor.

    Attributes:
        names: Names of the parameters, in the order of the mask.
        shapes: Their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, network: "nn.Module", exclude: Sequence[str] = ()) -> "WeightUnits":
        """The prunable weights of a network: those of convolutions, linear, attention and recurrent layers.

        Biases and normalisation parameters are never pruned. A weight that several modules share appears once; one that
        is an embedding's first stays dense with it.

        Args:
            network: Any module.
            exclude: Shell patterns of parameter names that stay dense, for instance `conv1.weight` or `linear.*`.

        Raises:
            ValueError: No weight is left to prune, a pattern matches no prunable weight, or a weight is not a plain
                parameter.
        """
        parameters = dict(network.named_parameters())
        known = {id(parameter) for parameter in parameters.values()}
        prunable: dict[int, tuple[str, tuple[int, ...]]] = {}
        for prefix, module in network.named_modules():
            for own_name in prunable_parameters(module):
                name, weight = f"{prefix}.{own_name}" if prefix else own_name, getattr(module, own_name)
                if id(weight) in known and id(weight) not in prunable and name not in parameters:
                    continue  # shared with a module before it that is no such layer, such as an embedding
                if id(weight) not in prunable and name not in parameters:
                    raise ValueError(
                        f"'{name}' is computed from other tensors (weight norm, another pruning) and cannot be masked; "
                        "make it a plain parameter first, for instance with "
                        "torch.nn.utils.parametrize.remove_parametrizations"
                    )
                prunable.setdefault(id(weight), (name, tuple(weight.shape)))
        found = list(prunable.values())
        for pattern in exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in found):
                is_module = any(fnmatch.fnmatchcase(name, f"{pattern}.*") for name, _ in found)
                raise ValueError(
                    f"exclude pattern '{pattern}' matches none of the prunable weights "
                    f"({', '.join(name for name, _ in found) or 'there are none'}); "
                    + (f"for all weights in it give '{pattern}.*'" if is_module else "correct or remove it")
                )
        kept = [(n, s) for n, s in found if not any(fnmatch.fnmatchcase(n, pattern) for pattern in exclude)]
        if not kept:
            raise ValueError(
                "expected at least one convolution or linear layer to prune, found none"
                + (
                    f" outside exclude={list(exclude)}; exclude less"
                    if found
                    else " in this network; give one that is made of torch's own layers, as before an export"
                )
            )
        return cls(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of weights per tensor, int64 (n_groups,)."""
        return np.array([prod(shape) for shape in self.shapes], dtype=np.int64)

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Concatenate one array for each tensor, in the order of the mask.

        Args:
            tensors: For each of the names an array of the tensor's shape; other names are ignored.

        Returns:
            Array (n_weights,).

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(f"expected '{name}' of shape {shape}, found {found}; was it made for another network?")
        return np.concatenate([np.asarray(tensors[name]).reshape(-1) for name in self.names])

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Cut a flat array (n_weights,) back into one view per tensor."""
        return {
            name: flat[start:stop].reshape(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets[:-1], self.offsets[1:], strict=True
            )
        }

    @property
    def n_weights(self) -> int:
        """Number of prunable weights."""
        return self.n_units

    def to_weights(self, bits: np.ndarray) -> np.ndarray:
        """Which weights the units of a mask keep, bool (n_weights,): here the same, bool (n_units,)."""
        return bits


def prunable_parameters(module: "nn.Module") -> list[str]:
    """The attribute names of the matrices with which a layer multiplies its inputs; none for other modules."""
    # Imported here, since figures and reports only read masks and should not have to wait for torch.
    from torch import nn

    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Bilinear):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        # One matrix for queries, keys and values, or three if they differ in width. The output matrix belongs to a
        # linear layer inside.
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [name for name in names if getattr(module, name) is not None]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]
    return []


def ranks_within_groups(scores: np.ndarray, units: Units) -> np.ndarray:
    """Rank every unit within its group; of equal scores the first comes first.

    Args:
        scores: float (n_units,), higher = keep.
        units: The groups.

    Returns:
        int32 (n_units,): 0 for the most important unit of a group.
    """
    ranks = np.empty(units.n_units, dtype=np.int32)
    for start, stop in pairwise(units.offsets):
        order = np.argsort(-scores[start:stop], kind="stable")
        ranks[start:stop][order] = np.arange(stop - start, dtype=np.int32)
    return ranks


def keep_top(ranks: np.ndarray, n_keep: Iterable[int], units: Units) -> np.ndarray:
    """The mask that keeps the best-ranked units of each group, as many as given.

    Args:
        ranks: int (n_units,), from `ranks_within_groups`.
        n_keep: Number of units to keep in each group, (n_groups,).
        units: The groups.

    Returns:
        bool (n_units,).
    """
    return ranks < np.repeat(np.asarray(n_keep, dtype=np.int32), units.sizes)
