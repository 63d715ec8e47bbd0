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
    """Masks that keep every weight of `lower` and none outside `upper`.

    Attributes:
        lower: uint64 (n_words,), always kept; packed like a mask.
        upper: uint64 (n_words,), may be kept; contains `lower`.
        units: The groups.
    """

    lower: np.ndarray
    upper: np.ndarray
    units: Units

    def __post_init__(self) -> None:
        # Checks shape, type and padding of both.
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
        """The corridor that two anchors cut out.

        The thresholds of Phase 1 do not nest: in a group the heavy anchor may keep what the light one drops. The ends
        are therefore the anchors' intersection and union, so that both anchors always lie in the corridor.

        Args:
            light: bool (n_units,).
            heavy: bool (n_units,).
            units: The groups.
        """
        return cls(pack_rows((light & heavy)[None])[0], pack_rows((light | heavy)[None])[0], units)

    @classmethod
    def around(cls, masks: PackedMasks, units: Units) -> "Corridor":
        """The smallest corridor that several masks lie in: their intersection and their union."""
        return cls(np.bitwise_and.reduce(masks.words), np.bitwise_or.reduce(masks.words), units)

    @classmethod
    def everything(cls, units: Units) -> "Corridor":
        """All masks: no corridor at all."""
        ends = pack_rows(np.stack([np.zeros(units.n_units, dtype=bool), np.ones(units.n_units, dtype=bool)]))
        return cls(ends[0], ends[1], units)

    @cached_property
    def searched(self) -> np.ndarray:
        """The weights that a mask in the corridor decides about, uint64 (n_words,)."""
        return self.upper & ~self.lower

    @cached_property
    def n_searched(self) -> int:
        """How many they are."""
        return int(np.bitwise_count(self.searched).sum())

    def restrict(self, masks: PackedMasks) -> PackedMasks:
        """Each mask moved to the nearest one in the corridor."""
        return PackedMasks((masks.words & self.upper) | self.lower, masks.n_units)

    @cached_property
    def groups(self) -> list[SearchedGroup]:
        """The groups in which there is something to search."""
        return searched_groups(self.units.offsets, self.searched)

    def rank(self, scores: np.ndarray) -> Ranking:
        """The searched weights of each of `groups` from the least to the most important.

        It is the order in which a group crosses the corridor from the light to the heavy anchor.

        Args:
            scores: float (n_units,), higher = keep.
        """
        return [group.rank(scores) for group in self.groups]


def choose_anchors(
    front: Front, dense_error: float, chance_error: float, *, light_tolerance: float, heavy_tolerance: float
) -> tuple[int, int]:
    """Pick the light and the heavy anchor from a Phase 1 front.

    With more than one cost they are chosen along the trade-off of the loss and the first cost.

    Both tolerances are shares of the way from the dense network's error to that of guessing, so that one rule serves
    any number of classes and both objectives. Light: the sparsest member within `light_tolerance` (none: the densest
    member). Heavy: the sparsest member within `heavy_tolerance`, sparser than light (none: the next sparser one).

    A front of one member has that one as both: one network is as good as any and cheaper, as where the dense network
    does little better than guessing. No corridor lies between, see `corridors_of`.

    Args:
        front: Phase 1's front.
        dense_error: Error-like objective of the dense network.
        chance_error: Error-like objective of guessing, 1 - 1/n_classes.
        light_tolerance: Share of the way, 0 to 1.
        heavy_tolerance: Share of the way, larger than `light_tolerance`.

    Returns:
        Indices of the light and the heavy anchor.

    Raises:
        ValueError: The front is empty.
    """
    along = _along(front)
    if not len(along):
        raise ValueError(
            "expected a Phase 1 front of at least one member, found none: each mask that was tried has an empty group, "
            "or is forbidden otherwise; allow more (`empty_layers: allow`), or give Phase 1 more evaluations"
        )
    if len(along) == 1:
        return int(along[0]), int(along[0])
    reach = chance_error - dense_error

    def sparsest_within(tolerance: float) -> int:
        """Position in `along`."""
        within = np.flatnonzero(front.error[along] <= dense_error + tolerance * reach)
        return int(within[-1]) if len(within) else 0

    light = min(sparsest_within(light_tolerance), len(along) - 2)
    heavy = max(sparsest_within(heavy_tolerance), light + 1)
    return int(along[light]), int(along[heavy])


def _along(front: Front) -> np.ndarray:
    """Members along the trade-off of the loss and the first cost, the dearest first, int64."""
    # Of two objectives, all members of a front.
    members = non_dominated(front.objectives[:, :2]) if len(front.names) > 2 else np.arange(len(front))
    order: np.ndarray = members[np.argsort(-front.costs[members, 0], kind="stable")]
    return order


def anchors_between(front: Front, light: int, heavy: int, n_corridors: int) -> list[int]:
    """Anchors from light to heavy that cut the front between them into stretches of about equal length.

    Length is measured along the front, loss and first cost counting alike.

    Args:
        front: Phase 1's front.
        light: Index of the light anchor.
        heavy: Index of the heavy anchor.
        n_corridors: Stretches wanted; a front with fewer members in between gives fewer.

    Returns:
        Indices of at most n_corridors + 1 different members, light first, heavy last; one, where both are the same.
    """
    if light == heavy:
        return [light]
    ordered = _along(front)
    positions = {int(member): i for i, member in enumerate(ordered)}
    members = ordered[positions[light] : positions[heavy] + 1]
    steps = np.abs(np.diff(front.objectives[members, :2], axis=0)).sum(axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, along[-1], n_corridors + 1)[1:-1]
    inner = np.unique(np.abs(along[None] - wanted[:, None]).argmin(axis=1)) if len(wanted) else np.array([], dtype=int)
    inner = inner[(inner > 0) & (inner < len(members) - 1)]
    return [light, *members[inner].tolist(), heavy]


def corridors_of(anchors: PackedMasks, units: Units) -> list[Corridor]:
    """The corridors between neighbouring anchors, which Phase 2 searches; with a single anchor all masks.

    Args:
        anchors: From light to heavy, at least one.
        units: The groups.
    """
    if len(anchors) == 1:
        return [Corridor.everything(units)]
    return [Corridor.around(anchors.select([i, i + 1]), units) for i in range(len(anchors) - 1)]


def describe_corridor(front: Front, light: int, heavy: int, corridor: Corridor) -> dict[str, Any]:
    """What a report says about the anchors and the corridor between them, as plain numbers.

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
