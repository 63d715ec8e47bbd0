"""Fronts of pruned networks: non-dominated sets, hypervolume, and the members people ask for.

Objectives are always minimised; the loss lies in the first column, the costs in the others. Nothing here needs torch.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import moocore
import numpy as np
from pymoo.util.nds.non_dominated_sorting import find_non_dominated

from paretoprune.files import read_npz, write_npz
from paretoprune.masks.packed import PackedMasks
from paretoprune.objectives import ERROR_AND_DENSITY, reference_point

if TYPE_CHECKING:
    from torch import Tensor, nn

# How far beyond a density still counts as the density.
_ROUNDING = 1e-9


def hypervolume(objectives: np.ndarray, reference: Sequence[float] = (1.0, 1.0)) -> float:
    """Volume dominated by points up to the reference point.

    Args:
        objectives: float (n, n_objectives), minimised; points at or beyond the reference add nothing.
        reference: One value for each objective, see `objectives.reference_point`.

    Returns:
        At least 0 and at most the product of the reference, larger is better; 0 for no points.

    Raises:
        ValueError: The points have more or fewer objectives than the reference.
    """
    objectives = np.asarray(objectives, dtype=float)
    if not len(objectives):
        return 0.0
    if objectives.ndim != 2 or objectives.shape[1] != len(reference):
        raise ValueError(
            f"expected points with {len(reference)} objectives as the reference has, found shape {objectives.shape}; "
            "give the reference of these objectives, see objectives.reference_point"
        )
    return float(moocore.hypervolume(objectives, ref=np.asarray(reference, dtype=float)))


def non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Which points no other point dominates; of equal points the first counts.

    Args:
        objectives: float (n, n_objectives), minimised, the loss in the first column.

    Returns:
        Indices int64 (n_front,), sorted by the costs, cheapest first.
    """
    objectives = np.asarray(objectives, dtype=float)
    if not len(objectives):
        return np.zeros(0, dtype=np.int64)
    _, first = np.unique(objectives, axis=0, return_index=True)
    front = first[find_non_dominated(objectives[first])]
    return front[by_cost(objectives[front])]


def by_cost(objectives: np.ndarray) -> np.ndarray:
    """Order of points by their first cost, then the further ones; equal points stay in order.

    Args:
        objectives: float (n, n_objectives), the loss in the first column.
    """
    return np.lexsort(objectives[:, :0:-1].T)


def spread_subset(
    objectives: np.ndarray, size: int, sparsities: Sequence[float] = (), reference: Sequence[float] = (1.0, 1.0)
) -> np.ndarray:
    """Members of a front that keep most of its hypervolume, taking away the least contributor until `size` are left.

    Args:
        objectives: float (n, n_objectives), mutually non-dominated.
        size: Largest number of members to keep, at least 2.
        sparsities: For each, of the members whose first cost is at most 1 - sparsity the best goes last.
        reference: See `hypervolume`.

    Returns:
        Indices int64, sorted by cost, cheapest first.
    """
    order = by_cost(objectives)
    kept = list(order)
    wanted = np.zeros(len(objectives), dtype=bool)
    for sparsity in sparsities:
        within = order[objectives[order, 1] <= 1 - sparsity + _ROUNDING]
        if len(within):
            # Of equal losses the dearest, as two objectives have it: there the last one is the best.
            wanted[within[np.lexsort((-np.arange(len(within)), objectives[within, 0]))[0]]] = True
    contributions = _boxes if objectives.shape[1] == 2 else _volumes
    while len(kept) > size:
        added = contributions(objectives[kept], np.asarray(reference, dtype=float))
        kept.pop(int(np.lexsort((added, wanted[kept]))[0]))
    return np.array(kept, dtype=np.int64)


def _boxes(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Area that only each member dominates, float (n,): to its left neighbour's loss, to its right neighbour's cost."""
    # Sorted by cost, they are sorted by loss too.
    loss, cost = front[:, 0], front[:, 1]
    width = np.concatenate([reference[:1], loss[:-1]]) - loss
    height = np.concatenate([cost[1:], reference[1:]]) - cost
    return width * height


def _volumes(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Volume that only each member dominates, float (n,)."""
    return np.asarray(moocore.hv_contributions(front, ref=reference), dtype=float)


def knee(objectives: np.ndarray) -> int:
    """The member farthest below the straight line between the two ends of the front.

    Both axes are scaled to the front's own range first. A front of one or two members has its sparsest as knee.

    Args:
        objectives: float (n, n_objectives), non-dominated.

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
    # The line (plane) joins the ends (0, 1) and (1, 0), so the distance below it grows with -(x + y).
    return int(np.lexsort((objectives[:, 1], scaled.sum(axis=1)))[0])


@dataclass
class Front:
    """Pruned networks, none of which is better than another in every objective.

    Attributes:
        masks: One mask per member.
        objectives: float64 (n_members, n_objectives): the loss on the search split, and the costs.
        stages: Which stage of the search found each member.
        names: Of the objectives.
        dense: The network that the members are pruned from; None for a front from a file.
        states: The state of each member's finished network, as it was measured; None for a front from a file.
    """

    masks: PackedMasks
    objectives: np.ndarray
    stages: list[str]
    names: tuple[str, ...] = ERROR_AND_DENSITY
    dense: "nn.Module | None" = field(default=None, repr=False)
    states: "list[dict[str, Tensor]] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.objectives = np.asarray(self.objectives, dtype=np.float64).reshape(-1, len(self.names))
        if not len(self.masks) == len(self.objectives) == len(self.stages):
            raise ValueError(
                f"expected as many objectives and stages as masks, found {len(self.masks)} masks, "
                f"{len(self.objectives)} objectives and {len(self.stages)} stages"
            )

    def __len__(self) -> int:
        return len(self.masks)

    @classmethod
    def empty(cls, n_units: int, names: tuple[str, ...] = ERROR_AND_DENSITY) -> "Front":
        """A front without members, over `n_units` units."""
        return cls(PackedMasks.empty(n_units), np.zeros((0, len(names))), [], names)

    @property
    def error(self) -> np.ndarray:
        """The loss per member, float64 (n_members,)."""
        return self.objectives[:, 0]

    @property
    def costs(self) -> np.ndarray:
        """The costs per member, float64 (n_members, n_objectives - 1), relative to the dense network."""
        return self.objectives[:, 1:]

    @property
    def density(self) -> np.ndarray:
        """Share of prunable weights kept, float64 (n_members,)."""
        return self.objectives[:, self.names.index("density")] if "density" in self.names else self.masks.density

    @property
    def sparsity(self) -> np.ndarray:
        """Share of prunable weights removed, float64 (n_members,)."""
        return 1.0 - self.density

    @property
    def sparsity_of_parameters(self) -> np.ndarray:
        """Removed weights as a share of all parameters, also those that cannot be pruned, float64 (n_members,).

        Raises:
            RuntimeError: The front was read from a file and knows no network.
        """
        if self.dense is None:
            raise RuntimeError("this front was read from a file and knows no network; call pareto_prune")
        n_parameters = sum(parameter.numel() for parameter in self.dense.parameters())
        return np.asarray((self.masks.n_units - self.masks.n_kept) / n_parameters)

    @property
    def reference(self) -> tuple[float, ...]:
        """Up to where hypervolume is measured."""
        return reference_point(self.names)

    def hypervolume(self) -> float:
        """Hypervolume of all objectives, see `objectives.reference_point`."""
        return hypervolume(self.objectives, self.reference)

    def select(self, indices: np.ndarray) -> "Front":
        """The members at `indices`, int (n,) or bool (n_members,), in that order."""
        indices = np.arange(len(self))[np.asarray(indices)] if len(indices) else np.zeros(0, dtype=np.int64)
        return Front(
            self.masks.select(indices),
            self.objectives[indices],
            [self.stages[i] for i in indices],
            self.names,
            self.dense,
            None if self.states is None else [self.states[i] for i in indices],
        )

    def merge(self, other: "Front") -> "Front":
        """The non-dominated members of both, cheapest first; of equal points this front's own is kept.

        The result knows no networks.

        Raises:
            ValueError: The two fronts are over different numbers of units, or have different objectives.
        """
        if self.names != other.names:
            raise ValueError(
                f"expected fronts of the same objectives, found {', '.join(self.names)} and {', '.join(other.names)}"
            )
        both = Front(
            self.masks.concatenate(other.masks),
            np.concatenate([self.objectives, other.objectives]),
            self.stages + other.stages,
            self.names,
        )
        return both.select(non_dominated(both.objectives))

    def thinned(self, size: int | None, sparsities: Sequence[float] = ()) -> "Front":
        """At most `size` members, all of them for None: those that keep most of the hypervolume.

        The best members beyond each of `sparsities` are among them, see `spread_subset`.
        """
        if size is None:
            return self
        return self.select(spread_subset(self.objectives, size, sparsities, self.reference))

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
        """A pruned and repaired copy of the network as it was measured, which needs nothing of this package to run.

        Args:
            index: Member of the front.

        Raises:
            RuntimeError: The front was read from a file and knows no network.
        """
        if self.dense is None or self.states is None:
            raise RuntimeError(
                "this front was read from a file and knows no network; call pareto_prune, or load the member's state "
                "from networks.safetensors with paretoprune.networks.checkpoints.load_networks"
            )
        network = copy.deepcopy(self.dense)
        network.load_state_dict(self.states[index])
        return network

    def arrays(self) -> dict[str, np.ndarray]:
        """The front as plain arrays, for an npz file; names of objectives only where they are not error and density."""
        names = {} if self.names == ERROR_AND_DENSITY else {"names": np.array(self.names, dtype=np.str_)}
        return {
            "words": self.masks.words,
            "n_weights": np.array(self.masks.n_units),
            "objectives": self.objectives,
            "stages": np.array(self.stages, dtype=np.str_),
            **names,
        }

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> "Front":
        """Undo `arrays`."""
        masks = PackedMasks(arrays["words"], int(arrays["n_weights"]))
        names = tuple(str(name) for name in arrays.get("names", ERROR_AND_DENSITY))
        return cls(masks, arrays["objectives"], [str(stage) for stage in arrays["stages"]], names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the front to an npz file: `words`, `n_weights`, `objectives`, `stages`, see `arrays`.

        A member's id is its position.
        """
        write_npz(path, self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Front":
        """Read what `save` wrote."""
        return cls.of_arrays(read_npz(path))
