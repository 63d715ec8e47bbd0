"""The corridor: the part of all masks that lies between two anchors, and the genome that spells a mask in it."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from paretoprune.fronts import Front
from paretoprune.masks import MaskLayout, PackedMasks, pack_rows, unpack_row


@dataclass(frozen=True)
class Corridor:
    """Masks that keep every weight of `lower` and none outside `upper`.

    A genome has one bit for each weight in between, in mask order, packed like a mask.

    Attributes:
        lower: bool (n_weights,), always kept.
        upper: bool (n_weights,), may be kept; contains `lower`.
        layout: The layers.
    """

    lower: np.ndarray
    upper: np.ndarray
    layout: MaskLayout

    def __post_init__(self) -> None:
        if np.any(self.lower & ~self.upper):
            raise ValueError("the lower end of a corridor must lie inside its upper end")
        if not self.n_searched:
            raise ValueError(
                "the light and the heavy anchor have the same mask, so there is nothing between them to search; "
                "choose `anchors` further apart (a smaller light_tolerance or a larger heavy_tolerance)"
            )

    @cached_property
    def positions(self) -> np.ndarray:
        """Where the searched weights lie in the mask, int64 (n_searched,)."""
        return np.flatnonzero(self.upper & ~self.lower)

    @classmethod
    def between(cls, light: np.ndarray, heavy: np.ndarray, layout: MaskLayout) -> "Corridor":
        """The corridor that two anchors cut out.

        The thresholds of Phase 1 do not nest: in a layer the heavy anchor may keep what the light one drops. The ends
        are therefore the anchors' intersection and union, so that both anchors always lie in the corridor.

        Args:
            light: bool (n_weights,).
            heavy: bool (n_weights,).
            layout: The layers.
        """
        return cls(light & heavy, light | heavy, layout)

    @classmethod
    def everything(cls, layout: MaskLayout) -> "Corridor":
        """All 2^n masks, for searches without anchors."""
        return cls(np.zeros(layout.n_weights, dtype=bool), np.ones(layout.n_weights, dtype=bool), layout)

    @property
    def n_searched(self) -> int:
        """Number of weights that a genome decides about."""
        return len(self.positions)

    @property
    def layer_offsets(self) -> np.ndarray:
        """Start of each layer in a genome and, last, its end; int64 (n_layers + 1,)."""
        return np.searchsorted(self.positions, self.layout.offsets)

    def expand(self, genomes: np.ndarray) -> PackedMasks:
        """Masks of genomes uint64 (n, n_words)."""
        rows = np.repeat(self.lower[None], len(genomes), axis=0)
        for row, genome in zip(rows, genomes, strict=True):
            row[self.positions] = unpack_row(genome, self.n_searched)
        return PackedMasks.pack(rows) if len(genomes) else PackedMasks.empty(self.layout.n_weights)

    def restrict(self, masks: PackedMasks) -> np.ndarray:
        """Genomes uint64 (n, n_words) of the masks, each moved to the nearest mask in the corridor."""
        rows = [masks.unpack(i)[self.positions] for i in range(len(masks))]
        return pack_rows(np.array(rows, dtype=bool).reshape(len(masks), self.n_searched))

    def coordinates(self, scores: np.ndarray) -> np.ndarray:
        """Where each searched weight stands among those of its own layer.

        It is the axis along which a layer crosses the corridor from the heavy to the light anchor.

        Args:
            scores: float (n_weights,), higher = keep.

        Returns:
            float32 (n_searched,) in (0, 1): near 1 the most important of its layer, kept the longest.
        """
        coordinates = np.empty(self.n_searched, dtype=np.float32)
        searched, offsets = scores[self.positions], self.layer_offsets
        for start, stop in pairwise(offsets):
            order = np.argsort(searched[start:stop], kind="stable")
            coordinates[start:stop][order] = (np.arange(stop - start) + 0.5) / max(stop - start, 1)
        return coordinates


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


def describe_corridor(front: Front, light: int, heavy: int, corridor: Corridor) -> dict[str, Any]:
    """What a report says about the anchors and the corridor between them, as plain numbers.

    Args:
        front: Phase 1's front.
        light: Index of the light anchor.
        heavy: Index of the heavy anchor.
        corridor: The corridor.
    """
    layout = corridor.layout
    per_layer = zip(
        layout.names,
        layout.sizes.tolist(),
        np.add.reduceat(corridor.lower, layout.offsets[:-1], dtype=np.int64).tolist(),
        np.diff(corridor.layer_offsets).tolist(),
        strict=True,
    )
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
