"""The corridor: the part of all masks that lies between two anchors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from paretoprune.fronts import Front, non_dominated
from paretoprune.masks.packed import PackedMasks, pack_rows
from paretoprune.masks.units import Units
from paretoprune.search.groups import Ranking, SearchedGroup, searched_groups


@dataclass(frozen=True)
class Corridor:
    """Masks that keep every unit of `lower` and none outside `upper`.

    Attributes:
        lower: uint64 (n_words,), the units that are always kept; packed like a mask.
        upper: uint64 (n_words,), the units that may be kept; contains `lower`.
        units: The groups.

    Raises:
        ValueError: The ends are not packed masks over the units, `lower` is not inside `upper`, or both are the same.
    """

    lower: np.ndarray
    upper: np.ndarray
    units: Units

    def __post_init__(self) -> None:
        # `PackedMasks` checks the shape, the type and the padding of both.
        PackedMasks(np.stack([self.lower, self.upper]), self.units.n_units)
        if np.any(self.lower & ~self.upper):
            raise ValueError("the lower end of a corridor must lie inside its upper end")
        if not self.n_searched:
            raise ValueError(
                "the light and the heavy anchor have the same mask, so there is nothing between them to search; "
                "choose `anchors` further apart (a smaller light_tolerance or a larger heavy_tolerance)"
            )

    @classmethod
    def between(cls, light: np.ndarray, heavy: np.ndarray, units: Units) -> "Corridor":
        """The corridor between two anchors: its ends are their intersection and their union.

        The thresholds of Phase 1 do not nest: in some group the heavy anchor may keep a unit that the light one drops.
        With these ends both anchors lie in the corridor nevertheless.

        Args:
            light: bool (n_units,).
            heavy: bool (n_units,).
            units: The groups.
        """
        return cls(pack_rows((light & heavy)[None])[0], pack_rows((light | heavy)[None])[0], units)

    @classmethod
    def around(cls, masks: PackedMasks, units: Units) -> "Corridor":
        """The smallest corridor that contains several masks: its ends are their intersection and their union."""
        return cls(np.bitwise_and.reduce(masks.words), np.bitwise_or.reduce(masks.words), units)

    @classmethod
    def everything(cls, units: Units) -> "Corridor":
        """The corridor that contains all masks."""
        ends = pack_rows(np.stack([np.zeros(units.n_units, dtype=bool), np.ones(units.n_units, dtype=bool)]))
        return cls(ends[0], ends[1], units)

    @cached_property
    def searched(self) -> np.ndarray:
        """The units that a mask in the corridor decides about, uint64 (n_words,)."""
        return self.upper & ~self.lower

    @cached_property
    def n_searched(self) -> int:
        """Number of searched units."""
        return int(np.bitwise_count(self.searched).sum())

    def restrict(self, masks: PackedMasks) -> PackedMasks:
        """Move each mask to the nearest one in the corridor."""
        return PackedMasks((masks.words & self.upper) | self.lower, masks.n_units)

    @cached_property
    def groups(self) -> list[SearchedGroup]:
        """The groups in which there is something to search."""
        return searched_groups(self.units.offsets, self.searched)

    def rank(self, scores: np.ndarray) -> Ranking:
        """Order the searched units of each of `groups` from the least to the most important.

        Args:
            scores: float (n_units,), higher = keep.
        """
        return [group.rank(scores) for group in self.groups]


def choose_anchors(
    front: Front, dense_error: float, chance_error: float, *, light_tolerance: float, heavy_tolerance: float
) -> tuple[int, int]:
    """Choose the light and the heavy anchor from a Phase 1 front.

    A tolerance is a share of the way from the dense network's loss to that of guessing, so that one rule serves any
    number of classes and each loss.

    - The light anchor is the sparsest member within `light_tolerance`, or the densest member if there is none.
    - The heavy anchor is the sparsest member within `heavy_tolerance`, or the next one after the light anchor if there
      is none that is sparser than that.

    With two costs, only members on the trade-off of the loss and the first cost are considered.

    If the front has a single member, that is both anchors. This happens if one network is as good as any and cheaper,
    for instance if the dense network is hardly better than guessing. Then there is no corridor, see `corridors_of`.

    Args:
        front: Phase 1's front.
        dense_error: Loss of the dense network.
        chance_error: Loss of guessing, 1 - 1/n_classes.
        light_tolerance: 0 to 1.
        heavy_tolerance: 0 to 1, larger than `light_tolerance`.

    Returns:
        Indices of the light and the heavy anchor.

    Raises:
        ValueError: The front is empty.
    """
    members = _on_first_tradeoff(front)
    if not len(members):
        raise ValueError(
            "expected a Phase 1 front of at least one member, found none: each mask that was tried has an empty group, "
            "or is forbidden otherwise; allow more (`empty_layers: allow`), or give Phase 1 more evaluations"
        )
    if len(members) == 1:
        return int(members[0]), int(members[0])
    way = chance_error - dense_error

    def sparsest_within(tolerance: float) -> int:
        """Position in `members`."""
        within = np.flatnonzero(front.error[members] <= dense_error + tolerance * way)
        return int(within[-1]) if len(within) else 0

    light = min(sparsest_within(light_tolerance), len(members) - 2)
    heavy = max(sparsest_within(heavy_tolerance), light + 1)
    return int(members[light]), int(members[heavy])


def _on_first_tradeoff(front: Front) -> np.ndarray:
    """Indices of the members on the trade-off of the loss and the first cost, the most costly one first, int64."""
    # With two objectives these are all members.
    members = non_dominated(front.objectives[:, :2]) if len(front.names) > 2 else np.arange(len(front))
    order: np.ndarray = members[np.argsort(-front.costs[members, 0], kind="stable")]
    return order


def anchors_between(front: Front, light: int, heavy: int, n_corridors: int) -> list[int]:
    """Choose anchors from light to heavy that cut the front between them into stretches of about equal length.

    The length of a step from one member to the next is the sum of its changes in the loss and in the first cost.

    Args:
        front: Phase 1's front.
        light: Index of the light anchor.
        heavy: Index of the heavy anchor.
        n_corridors: Number of stretches; there are fewer if the front has too few members in between.

    Returns:
        Indices of at most n_corridors + 1 different members from light to heavy; a single one if both are the same.
    """
    if light == heavy:
        return [light]
    ordered = _on_first_tradeoff(front)
    positions = {int(member): i for i, member in enumerate(ordered)}
    members = ordered[positions[light] : positions[heavy] + 1]
    steps = np.abs(np.diff(front.objectives[members, :2], axis=0)).sum(axis=1)
    length = np.concatenate([[0.0], np.cumsum(steps)])
    cuts = np.linspace(0.0, length[-1], n_corridors + 1)[1:-1]
    # The member that is nearest to each cut. Two cuts may have the same one, or one of the two ends, which are there
    # already.
    inner = np.unique(np.abs(length[None] - cuts[:, None]).argmin(axis=1)) if len(cuts) else np.array([], dtype=int)
    inner = inner[(inner > 0) & (inner < len(members) - 1)]
    return [light, *members[inner].tolist(), heavy]


def corridors_of(anchors: PackedMasks, units: Units) -> list[Corridor]:
    """The corridors between neighbouring anchors, which Phase 2 searches; with a single anchor one of all masks.

    Args:
        anchors: From light to heavy, at least one.
        units: The groups.
    """
    if len(anchors) == 1:
        return [Corridor.everything(units)]
    return [Corridor.around(anchors.select([i, i + 1]), units) for i in range(len(anchors) - 1)]


def describe_corridor(front: Front, light: int, heavy: int, corridor: Corridor) -> dict[str, Any]:
    """Describe the anchors and the corridor between them in plain numbers, as the report shows them.

    Args:
        front: Phase 1's front.
        light: Index of the light anchor.
        heavy: Index of the heavy anchor.
        corridor: The corridor.
    """
    units = corridor.units
    kept_and_searched = PackedMasks(np.stack([corridor.lower, corridor.searched]), units.n_units)
    per_layer = zip(units.names, units.sizes.tolist(), *units.n_kept(kept_and_searched).tolist(), strict=True)
    anchors = {
        name: {"id": i, "density": float(front.density[i]), "error": float(front.error[i])}
        for name, i in (("light", light), ("heavy", heavy))
    }
    return {
        **anchors,
        "n_weights": units.n_units,
        "n_corridor": corridor.n_searched,
        "layers": [
            {
                "layer": name,
                "n_weights": size,
                "n_always_kept": kept,
                "n_corridor": searched,
                "n_always_dropped": size - kept - searched,
            }
            for name, size, kept, searched in per_layer
        ],
    }
