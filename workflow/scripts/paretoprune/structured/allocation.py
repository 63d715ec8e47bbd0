"""Starting points of a search over units: how many units each coupling keeps at a given cost."""

from collections.abc import Callable, Sequence
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


def cheapest_within(
    units: ChannelUnits, curves: Sequence[np.ndarray], ranks: np.ndarray, cost: Cost, budget: float
) -> np.ndarray:
    """The allocation of least total loss within a budget, if losses of couplings add up.

    Each coupling keeps the number of units k of least loss(k) + price * cost(k), at the price that meets the budget.
    What is left of the budget then goes to where most loss is saved for it: prices alone find no allocation between two
    of which one has a whole branch more.

    Args:
        units: What can be cut.
        curves: From `loss_curves` or `measured_curves`.
        ranks: int (n_units,), see `masks.units.ranks_within_groups`.
        cost: Of masks, relative to the whole network.
        budget: Largest cost.

    Returns:
        Units to keep, int64 (n_groups,); the smallest allocation where even that costs more.
    """
    costs = _costs_of_groups(units, ranks, cost)

    def at(price: float) -> np.ndarray:
        return np.array(
            [int(np.argmin(curve + price * spent)) for curve, spent in zip(curves, costs, strict=True)], dtype=np.int64
        )

    def spent_by(n_keep: np.ndarray) -> float:
        mask = keep_top(ranks, n_keep, units)
        return float(cost.of(PackedMasks.pack_each([mask], units.n_units))[0])

    low, high = -12.0, 12.0  # powers of ten
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent_by(at(10.0**middle)) > budget else (low, middle)
    n_keep = at(10.0**high)
    while (more := _one_more(n_keep, curves, costs, lambda row: spent_by(row) <= budget)) is not None:
        n_keep = more
    return n_keep


def _one_more(
    n_keep: np.ndarray, curves: Sequence[np.ndarray], costs: Sequence[np.ndarray], fits: Callable[[np.ndarray], bool]
) -> np.ndarray | None:
    """An allocation with more units of one coupling, of those that fit the one that saves most loss for its cost."""
    steps = []
    for g, (k, curve, spent) in enumerate(zip(n_keep.tolist(), curves, costs, strict=True)):
        saved, extra = curve[k] - curve[k + 1 :], spent[k + 1 :] - spent[k]
        rates = saved / np.maximum(extra, TINY)
        steps += [(float(rates[i]), g, k + 1 + int(i)) for i in np.flatnonzero(saved > 0)]
    for _, g, k in sorted(steps, reverse=True):
        more = n_keep.copy()
        more[g] = k
        if fits(more):
            return more
    return None


def ladder_of(units: ChannelUnits, scores: np.ndarray, cost: Cost) -> Ladder:
    """Rungs for level switches at about constant cost, see `search.levels`.

    Args:
        units: What can be cut.
        scores: float (n_units,), higher = keep.
        cost: Of masks, relative to the whole network.
    """
    densities = np.linspace(0.0, 1.0, N_RUNGS)
    each = _costs_of_groups(units, ranks_within_groups(scores, units), cost)
    amounts = [spent[np.rint(densities * (len(spent) - 1)).astype(np.int64)] for spent in each]
    return Ladder(densities, np.maximum.accumulate(np.rint(np.array(amounts) / FINEST_COST).astype(np.int64), axis=1))


def uniform_within(units: ChannelUnits, ranks: np.ndarray, cost: Cost, budget: float) -> np.ndarray:
    """The same share of every coupling, the largest within a budget; at least one unit of each."""
    best = np.maximum(1, 0 * units.sizes)
    for share in np.linspace(0.0, 1.0, 101):
        n_keep = np.maximum(1, np.rint(share * units.sizes)).astype(np.int64)
        mask = keep_top(ranks, n_keep, units)
        if float(cost.of(PackedMasks.pack_each([mask], units.n_units))[0]) <= budget:
            best = n_keep
    return best


def _costs_of_groups(units: ChannelUnits, ranks: np.ndarray, cost: Cost) -> list[np.ndarray]:
    """What each coupling adds to the cost by the units it keeps, with all others whole, float64 (size + 1,)."""
    found = []
    for g, size in enumerate(units.sizes.tolist()):
        rows = []
        # Not a straight line where hardware takes as long for a few channels less: there nothing is gained by them.
        at = np.unique(np.rint(np.linspace(0, size, min(size, N_PRICED) + 1)))
        for k in at:
            n_keep = units.sizes.copy()
            n_keep[g] = k
            rows.append(keep_top(ranks, n_keep, units))
        costs = cost.of(PackedMasks.pack_each(rows, units.n_units))
        found.append(np.maximum(np.interp(np.arange(size + 1), at, costs - costs[0]), 0.0))
    return found
