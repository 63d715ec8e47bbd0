"""Fronts of pruned networks: non-dominated sets, hypervolume, and the members people ask for.

Objectives are always minimised and lie in the columns (error, density). Nothing here needs torch.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import find_non_dominated

from paretoprune.files import read_npz, write_npz
from paretoprune.masks.packed import PackedMasks

if TYPE_CHECKING:
    from torch import nn

REFERENCE_POINT = (1.0, 1.0)
# How far beyond a density still counts as the density.
_ROUNDING = 1e-9


def hypervolume(objectives: np.ndarray, reference: Sequence[float] = REFERENCE_POINT) -> float:
    """Area or volume dominated by points up to a reference point.

    Args:
        objectives: float (n, m), minimised; points at or beyond the reference add nothing.
        reference: m values; by default (1, 1), for points (error, density).

    Returns:
        At least 0, larger is better; 0 for no points.
    """
    objectives = np.asarray(objectives, dtype=float).reshape(-1, len(reference))
    if not len(objectives):
        return 0.0
    return float(HV(ref_point=np.array(reference))(objectives))


def non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Which points no other point dominates; of equal points the first counts.

    Args:
        objectives: float (n, 2), minimised.

    Returns:
        Indices int64 (n_front,), sorted by density, sparsest first.
    """
    objectives = np.asarray(objectives, dtype=float).reshape(-1, 2)
    _, first = np.unique(objectives, axis=0, return_index=True)
    front = first[find_non_dominated(objectives[first])] if len(first) else first
    return front[np.argsort(objectives[front, 1], kind="stable")]


def spread_subset(objectives: np.ndarray, size: int, sparsities: Sequence[float] = ()) -> np.ndarray:
    """Members of a front that keep most of its hypervolume, taking away the least contributor until `size` are left.

    Args:
        objectives: float (n, 2), mutually non-dominated.
        size: Largest number of members to keep, at least 2.
        sparsities: For each, of the members at least that sparse, the one with least error goes last.

    Returns:
        Indices int64, sorted by density, sparsest first.
    """
    order = np.argsort(objectives[:, 1], kind="stable")
    kept = list(order)
    # Sorted by density, they are sorted by error too.
    n_sparser = np.searchsorted(objectives[order, 1], 1 - np.asarray(sparsities) + _ROUNDING, side="right")
    wanted = np.zeros(len(objectives), dtype=bool)
    wanted[order[n_sparser[n_sparser > 0] - 1]] = True
    while len(kept) > size:
        error, density = objectives[kept, 0], objectives[kept, 1]
        # The box that only this member dominates: to its left neighbour's error, to its right neighbour's density.
        width = np.concatenate([[REFERENCE_POINT[0]], error[:-1]]) - error
        height = np.concatenate([density[1:], [REFERENCE_POINT[1]]]) - density
        kept.pop(int(np.lexsort((width * height, wanted[kept]))[0]))
    return np.array(kept, dtype=np.int64)


def knee(objectives: np.ndarray) -> int:
    """The member farthest below the straight line between the two ends of the front.

    Both axes are scaled to the front's own range first. A front of one or two members has its sparsest as knee.

    Args:
        objectives: float (n, 2), non-dominated.

    Returns:
        Index of the knee.

    Raises:
        ValueError: The front is empty.

    Source:
        Das, "On characterizing the 'knee' of the Pareto curve based on normal-boundary intersection", 1999.
    """
    if not len(objectives):
        raise ValueError("expected a front with at least one member, found none")
    low, high = objectives.min(axis=0), objectives.max(axis=0)
    scaled = (objectives - low) / np.where(high > low, high - low, 1.0)
    # The line joins (0, 1) and (1, 0), so the distance below it grows with -(x + y).
    return int(np.lexsort((objectives[:, 1], scaled.sum(axis=1)))[0])


@dataclass
class Front:
    """Pruned networks, none of which is better than another in both error and density.

    Attributes:
        masks: One mask per member.
        objectives: float64 (n_members, 2): error-like objective on the search split, and density.
        stages: Which stage of the search found each member.
        builder: Makes the pruned and repaired network of one boolean mask (n_weights,); None for a front from a file.
    """

    masks: PackedMasks
    objectives: np.ndarray
    stages: list[str]
    builder: "Callable[[np.ndarray], nn.Module] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.objectives = np.asarray(self.objectives, dtype=np.float64).reshape(-1, 2)
        if not len(self.masks) == len(self.objectives) == len(self.stages):
            raise ValueError(
                f"expected as many objectives and stages as masks, found {len(self.masks)} masks, "
                f"{len(self.objectives)} objectives and {len(self.stages)} stages"
            )

    def __len__(self) -> int:
        return len(self.masks)

    @classmethod
    def empty(cls, n_weights: int) -> "Front":
        """A front without members, over `n_weights` weights."""
        return cls(PackedMasks.empty(n_weights), np.zeros((0, 2)), [])

    @property
    def error(self) -> np.ndarray:
        """The error-like objective per member, float64 (n_members,)."""
        return self.objectives[:, 0]

    @property
    def density(self) -> np.ndarray:
        """Share of prunable weights kept, float64 (n_members,)."""
        return self.objectives[:, 1]

    @property
    def sparsity(self) -> np.ndarray:
        """Share of prunable weights removed, float64 (n_members,)."""
        return 1.0 - self.objectives[:, 1]

    def hypervolume(self) -> float:
        """Hypervolume on (error, density) with reference point (1, 1)."""
        return hypervolume(self.objectives)

    def select(self, indices: np.ndarray) -> "Front":
        """The members at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        stages = [self.stages[i] for i in indices]
        return Front(self.masks.select(indices), self.objectives[indices], stages, self.builder)

    def merge(self, other: "Front") -> "Front":
        """The non-dominated members of both, sparsest first; of equal points this front's own is kept.

        Raises:
            ValueError: The two fronts are over different numbers of weights.
        """
        both = Front(
            self.masks.concatenate(other.masks),
            np.concatenate([self.objectives, other.objectives]),
            self.stages + other.stages,
            self.builder,
        )
        return both.select(non_dominated(both.objectives))

    def thinned(self, size: int | None, sparsities: Sequence[float] = ()) -> "Front":
        """At most `size` members, all of them for None: those that keep most of the hypervolume.

        The best members beyond each of `sparsities` are among them, see `spread_subset`.
        """
        return self if size is None else self.select(spread_subset(self.objectives, size, sparsities))

    def closest(self, *, sparsity: float) -> int:
        """Index of the member of nearest sparsity; of two, the one with less error.

        Args:
            sparsity: Share of weights removed, 0 to 1.

        Raises:
            ValueError: `sparsity` is not a share, or the front is empty.
        """
        if not 0 <= sparsity <= 1:
            raise ValueError(f"expected a sparsity between 0 and 1, found {sparsity}; 80 % is 0.8")
        if not len(self):
            raise ValueError("the front has no members")
        return int(np.lexsort((self.error, np.abs(self.sparsity - sparsity)))[0])

    def knee(self) -> int:
        """Index of the knee of the front."""
        return knee(self.objectives)

    def network(self, index: int) -> "nn.Module":
        """A pruned and repaired copy of the network, which needs nothing of this package to run.

        Args:
            index: Member of the front.

        Raises:
            RuntimeError: The front was read from a file and knows no network.
        """
        if self.builder is None:
            raise RuntimeError(
                "this front was read from a file and knows no network; call pareto_prune, "
                "or apply the member's mask with paretoprune.evaluation.PopulationEvaluator.build"
            )
        return self.builder(self.masks.unpack(index))

    def arrays(self) -> dict[str, np.ndarray]:
        """The front as plain arrays, for an npz file."""
        return {
            "words": self.masks.words,
            "n_weights": np.array(self.masks.n_weights),
            "objectives": self.objectives,
            "stages": np.array(self.stages, dtype=np.str_),
        }

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> "Front":
        """Undo `arrays`."""
        masks = PackedMasks(arrays["words"], int(arrays["n_weights"]))
        return cls(masks, arrays["objectives"], [str(stage) for stage in arrays["stages"]])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the front to an npz file: `words`, `n_weights`, `objectives`, `stages`.

        A member's id is its position.
        """
        write_npz(path, self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Front":
        """Read what `save` wrote."""
        return cls.of_arrays(read_npz(path))
