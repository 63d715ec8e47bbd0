"""Starting points of a search over units: how many units each coupling keeps at a given cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import keep_top, ranks_within_groups
from paretoprune.objectives import Cost
from paretoprune.search.levels import Ladder
from paretoprune.structured.units import ChannelUnits

# Shares of a coupling at which its own divergence is measured.
MEASURED_SHARES = (0.0, 0.25, 0.5)
# Widths of a coupling at which its cost is worked out, at most, and straight lines between them.
N_PRICED = 64
# Shares of all couplings that a uniform allocation may have, and allocations that are priced at a time.
N_SHARES, AT_ONCE = 101, 64
# A cost that counts as none.
TINY = 1e-12
# Halvings of the price of a cost: enough for single units of a hundred thousand.
N_HALVINGS = 40
# Rungs of a ladder, and the share of the whole network's cost that is 1 on it.
N_RUNGS, FINEST_COST = 17, 1e-6


def loss_curves(units: ChannelUnits, scores: np.ndarray) -> list[np.ndarray]:
    """What each coupling loses as a function of the units that it keeps, from scores that are cumulative losses.

    Args:
        units: What can be cut.
        scores: float (n_units,), from `structured.elimination.elimination_scores`.

    Returns:
        For each coupling float64 (n_units + 1,): entry k is what is lost with k units kept, infinite where nothing may
        not be kept.
    """
    curves = []
    for coupling, (start, stop) in zip(units.couplings, pairwise(units.offsets), strict=True):
        # Of k kept units, the last that went is the (k + 1)-th best.
        lost = np.sort(scores[start:stop].astype(np.float64))[::-1]
        curve = np.append(lost, 0.0)
        if not coupling.may_vanish:
            curve[0] = np.inf
        curves.append(curve)
    return curves


def measured_curves(
    units: ChannelUnits,
    scores: np.ndarray,
    measure: Callable[[PackedMasks], np.ndarray],
    shares: Sequence[float] = MEASURED_SHARES,
) -> list[np.ndarray]:
    """Likewise, of losses that are measured for each coupling alone at a few shares.

    Between two of them losses go as the curves from `loss_curves` do: straight lines would only ever be cut at their
    ends.

    Args:
        units: What can be cut.
        scores: float (n_units,), from `structured.elimination.elimination_scores`.
        measure: Masks to losses, float64 (n_masks,); the whole network has none.
        shares: Shares of the units that are kept, below 1.
    """
    ranks = ranks_within_groups(scores, units)
    rows, places = [], []
    for g, coupling in enumerate(units.couplings):
        least = 0 if coupling.may_vanish else 1
        for k in sorted({max(least, round(share * coupling.n_units)) for share in shares}):
            n_keep = units.sizes.copy()
            n_keep[g] = k
            rows.append(keep_top(ranks, n_keep, units))
            places.append((g, k))
    losses = measure(PackedMasks.pack_each(rows, units.n_units))
    curves = []
    for g, (coupling, expected) in enumerate(zip(units.couplings, loss_curves(units, scores), strict=True)):
        at = [k for group, k in places if group == g] + [coupling.n_units]
        found = [float(loss) for (group, _), loss in zip(places, losses, strict=True) if group == g] + [0.0]
        # Fewer units never lose less: what says so is noise.
        found = np.maximum.accumulate(np.array(found)[::-1])[::-1].tolist()
        curve = np.full(coupling.n_units + 1, np.inf)
        for (first, high), (last, low) in pairwise(zip(at, found, strict=True)):
            curve[first : last + 1] = low + (high - low) * _share_left(expected[first : last + 1])
        curves.append(curve)
    return curves


def _share_left(falling: np.ndarray) -> np.ndarray:
    """Falling values as shares of the way from their end to their start; a straight line where they do not fall."""
    height = falling[0] - falling[-1]
    if not height > 0:
        return np.linspace(1.0, 0.0, len(falling))
    return np.asarray((falling - falling[-1]) / height)


@dataclass(frozen=True)
class Prices:
    """What allocations cost, each of them with the best units of every coupling.

    Attributes:
        units: What can be cut.
        scores: float (n_units,), higher = keep.
        cost: Of masks, relative to the whole network.
    """

    units: ChannelUnits
    scores: np.ndarray
    cost: Cost

    @cached_property
    def ranks(self) -> np.ndarray:
        """Of the units within their couplings, see `masks.units.ranks_within_groups`."""
        return ranks_within_groups(self.scores, self.units)

    def mask(self, n_keep: np.ndarray) -> np.ndarray:
        """The mask, bool (n_units,), that keeps so many units of each coupling, int (n_groups,)."""
        return keep_top(self.ranks, n_keep, self.units)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Costs of allocations, int (n_rows, n_groups); float64 (n_rows,)."""
        return self.cost.of(PackedMasks.pack_each((self.mask(row) for row in rows), self.units.n_units))

    @cached_property
    def of_groups(self) -> list[np.ndarray]:
        """What each coupling adds by the units it keeps, with all others whole, float64 (size + 1,)."""
        found = []
        for g, size in enumerate(self.units.sizes.tolist()):
            # Not a straight line where hardware takes as long for a few channels less: there nothing is gained by them.
            at = np.unique(np.rint(np.linspace(0, size, min(size, N_PRICED) + 1)))
            rows = np.repeat(self.units.sizes[None], len(at), axis=0)
            rows[:, g] = at
            costs = self.of(rows)
            found.append(np.maximum(np.interp(np.arange(size + 1), at, costs - costs[0]), 0.0))
        return found


def cheapest_within(prices: Prices, curves: Sequence[np.ndarray], budget: float) -> np.ndarray:
    """The allocation of least total loss within a budget, if losses of couplings add up.

    Each coupling keeps the number of units k of least loss(k) + price * cost(k), at the price that meets the budget.
    What is left of the budget then goes to where most loss is saved for it: prices alone find no allocation between two
    of which one has a whole branch more.

    Args:
        prices: What allocations cost.
        curves: From `loss_curves` or `measured_curves`.
        budget: Largest cost.

    Returns:
        Units to keep, int64 (n_groups,); the smallest allocation where even that costs more.
    """

    def at(price: float) -> np.ndarray:
        best = [int(np.argmin(curve + price * spent)) for curve, spent in zip(curves, prices.of_groups, strict=True)]
        return np.array(best, dtype=np.int64)

    low, high = -12.0, 12.0  # powers of ten
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if prices.of(at(10.0**middle)[None])[0] > budget else (low, middle)
    n_keep = at(10.0**high)
    while (more := _one_more(n_keep, prices, curves, budget)) is not None:
        n_keep = more
    return n_keep


def _one_more(n_keep: np.ndarray, prices: Prices, curves: Sequence[np.ndarray], budget: float) -> np.ndarray | None:
    """An allocation with more units of one coupling, of those that fit the one that saves most loss for its cost."""
    steps = []
    for g, (k, curve, spent) in enumerate(zip(n_keep.tolist(), curves, prices.of_groups, strict=True)):
        saved, extra = curve[k] - curve[k + 1 :], spent[k + 1 :] - spent[k]
        rates = saved / np.maximum(extra, TINY)
        steps += [(float(rates[i]), g, k + 1 + int(i)) for i in np.flatnonzero(saved > 0)]
    steps.sort(reverse=True)
    for start in range(0, len(steps), AT_ONCE):
        some = steps[start : start + AT_ONCE]
        rows = np.repeat(n_keep[None], len(some), axis=0)
        rows[np.arange(len(some)), [g for _, g, _ in some]] = [k for *_, k in some]
        fit = np.flatnonzero(prices.of(rows) <= budget)
        if len(fit):
            return rows[fit[0]]
    return None


def uniform_within(prices: Prices, budget: float) -> np.ndarray:
    """The same share of every coupling, the largest within a budget; at least one unit of each.

    Returns:
        Units to keep, int64 (n_groups,).
    """
    shares = np.linspace(0.0, 1.0, N_SHARES)
    rows = np.maximum(1, np.rint(shares[:, None] * prices.units.sizes)).astype(np.int64)
    fit = np.flatnonzero(prices.of(rows) <= budget)
    return rows[fit[-1] if len(fit) else 0]


def ladder_of(prices: Prices) -> Ladder:
    """Rungs for level switches at about constant cost, see `search.levels`."""
    densities = np.linspace(0.0, 1.0, N_RUNGS)
    amounts = [spent[np.rint(densities * (len(spent) - 1)).astype(np.int64)] for spent in prices.of_groups]
    return Ladder(densities, np.maximum.accumulate(np.rint(np.array(amounts) / FINEST_COST).astype(np.int64), axis=1))
