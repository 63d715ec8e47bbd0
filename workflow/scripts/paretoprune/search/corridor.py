"""The corridor: the part of all masks that lies between two anchors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks, pack_rows
from paretoprune.masks.units import WeightUnits
from paretoprune.search.operators import Ranking, SearchedLayer, searched_layers


@dataclass(frozen=True)
class Corridor:
    """Masks that keep every weight of `lower` and none outside `upper`.

    Attributes:
        lower: uint64 (n_words,), always kept; packed like a mask.
        upper: uint64 (n_words,), may be kept; contains `lower`.
        layout: The layers.
    """

    lower: np.ndarray
    upper: np.ndarray
    layout: WeightUnits

    def __post_init__(self) -> None:
        # Checks shape, type and padding of both.
        PackedMasks(np.stack([self.lower, self.upper]), self.layout.n_weights)
        if np.any(self.lower & ~self.upper):
            raise ValueError("the lower end of a corridor must lie inside its upper end")
        if not self.n_searched:
            raise ValueError(
                "the light and the heavy anchor have the same mask, so there is nothing between them to search; "
                "choose `anchors` further apart (a smaller light_tolerance or a larger heavy_tolerance)"
            )

    @classmethod
    def between(cls, light: np.ndarray, heavy: np.ndarray, layout: WeightUnits) -> "Corridor":
        """The corridor that two anchors cut out.

        The thresholds of Phase 1 do not nest: in a layer the heavy anchor may keep what the light one drops. The ends
        are therefore the anchors' intersection and union, so that both anchors always lie in the corridor.

        Args:
            light: bool (n_weights,).
            heavy: bool (n_weights,).
            layout: The layers.
        """
        return cls(pack_rows((light & heavy)[None])[0], pack_rows((light | heavy)[None])[0], layout)

    @classmethod
    def around(cls, masks: PackedMasks, layout: WeightUnits) -> "Corridor":
        """The smallest corridor that several masks lie in: their intersection and their union."""
        return cls(np.bitwise_and.reduce(masks.words), np.bitwise_or.reduce(masks.words), layout)

    @classmethod
    def everything(cls, layout: WeightUnits) -> "Corridor":
        """All masks: no corridor at all."""
        ends = pack_rows(np.stack([np.zeros(layout.n_weights, dtype=bool), np.ones(layout.n_weights, dtype=bool)]))
        return cls(ends[0], ends[1], layout)

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
    def layers(self) -> list[SearchedLayer]:
        """The layers in which there is something to search."""
        return searched_layers(self.layout.offsets, self.searched)

    def rank(self, scores: np.ndarray) -> Ranking:
        """The searched weights of each of `layers` from the least to the most important.

        It is the order in which a layer crosses the corridor from the light to the heavy anchor.

        Args:
            scores: float (n_weights,), higher = keep.
        """
        return [layer.rank(scores) for layer in self.layers]


def choose_anchors(
    front: Front, dense_error: float, chance_error: float, *, light_tolerance: float, heavy_tolerance: float
) -> tuple[int, int]:
    """Pick the light and the heavy anchor from a Phase 1 front.

    Both tolerances are shares of the way from the dense network's error to that of guessing, so that one rule serves
    any number of classes and both objectives. Light: the sparsest member within `light_tolerance` (none: the densest
    member). Heavy: the sparsest member within `heavy_tolerance`, sparser than light (none: the next sparser one).

    Args:
        front: Phase 1's front.
        dense_error: Error-like objective of the dense network.
        chance_error: Error-like objective of guessing, 1 - 1/n_classes.
        light_tolerance: Share of the way, 0 to 1.
        heavy_tolerance: Share of the way, larger than `light_tolerance`.

    Returns:
        Indices of the light and the heavy anchor.

    Raises:
        ValueError: The front has fewer than two members.
    """
    if len(front) < 2:
        raise ValueError(
            f"expected a Phase 1 front of at least two members to draw a corridor between, found {len(front)}; give "
            "Phase 1 more evaluations"
        )
    reach = chance_error - dense_error
    by_density = np.argsort(-front.density, kind="stable")

    def sparsest_within(tolerance: float) -> int:
        """Position along `by_density`."""
        within = np.flatnonzero(front.error[by_density] <= dense_error + tolerance * reach)
        return int(within[-1]) if len(within) else 0

    light = min(sparsest_within(light_tolerance), len(front) - 2)
    heavy = max(sparsest_within(heavy_tolerance), light + 1)
    return int(by_density[light]), int(by_density[heavy])


def anchors_between(front: Front, light: int, heavy: int, n_corridors: int) -> list[int]:
    """Anchors from light to heavy that cut the front between them into stretches of about equal length.

    Length is measured along the front, error and density counting alike.

    Args:
        front: Phase 1's front.
        light: Index of the light anchor.
        heavy: Index of the heavy anchor.
        n_corridors: Stretches wanted; a front with fewer members in between gives fewer.

    Returns:
        Indices of at most n_corridors + 1 different members, light first, heavy last.
    """
    by_density = np.argsort(-front.density, kind="stable")
    positions = {int(member): i for i, member in enumerate(by_density)}
    members = by_density[positions[light] : positions[heavy] + 1]
    steps = np.abs(np.diff(front.objectives[members], axis=0)).sum(axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, along[-1], n_corridors + 1)[1:-1]
    inner = np.unique(np.abs(along[None] - wanted[:, None]).argmin(axis=1)) if len(wanted) else np.array([], dtype=int)
    inner = inner[(inner > 0) & (inner < len(members) - 1)]
    return [light, *members[inner].tolist(), heavy]


def corridors_of(anchors: PackedMasks, n_corridors: int, layout: WeightUnits) -> list[Corridor]:
    """What Phase 2 searches: the corridors between neighbouring anchors, or everything where none is wanted.

    Args:
        anchors: From light to heavy, at least two.
        n_corridors: 0 for no corridor.
        layout: The layers.
    """
    if not n_corridors:
        return [Corridor.everything(layout)]
    return [Corridor.around(anchors.select([i, i + 1]), layout) for i in range(len(anchors) - 1)]


def corridor_around(anchors: PackedMasks, n_corridors: int, layout: WeightUnits) -> Corridor:
    """The one corridor that holds all of `corridors_of`, for a description."""
    return Corridor.around(anchors, layout) if n_corridors else Corridor.everything(layout)


def describe_corridor(front: Front, light: int, heavy: int, corridor: Corridor) -> dict[str, Any]:
    """What a report says about the anchors and the corridor between them, as plain numbers.

    Args:
        front: Phase 1's front.
        light: Index of the light anchor.
        heavy: Index of the heavy anchor.
        corridor: The corridor.
    """
    layout = corridor.layout
    kept_and_searched = PackedMasks(np.stack([corridor.lower, corridor.searched]), layout.n_weights)
    per_layer = zip(layout.names, layout.sizes.tolist(), *layout.n_kept(kept_and_searched).tolist(), strict=True)
    anchors = {
        name: {"id": i, "density": float(front.density[i]), "error": float(front.error[i])}
        for name, i in (("light", light), ("heavy", heavy))
    }
    return {
        **anchors,
        "n_weights": layout.n_weights,
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
