"""Ladders: the densities that a group may have, and moves along them at constant total density."""

import numpy as np
from numpy.random import Generator

# Sparsest rung of a ladder, as a share of a group.
LOWEST_RUNG = 0.005


def ladder_of_densities(n_rungs: int) -> np.ndarray:
    """Densities that a group may have on a ladder, evenly spaced in their logarithm, sparsest first, 1 last."""
    return np.geomspace(LOWEST_RUNG, 1.0, n_rungs)


def nearest_rungs(densities: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """The rung of a ladder that is nearest to each density, in the logarithm; int64, the shape of `densities`.

    Args:
        densities: Any shape, 0 to 1.
        rungs: float (n_rungs,), rising, above 0.
    """
    between = np.sqrt(rungs[1:] * rungs[:-1])
    return np.searchsorted(between, densities, side="left")


def switch_levels(levels: np.ndarray, n_kept: np.ndarray, rng: Generator) -> np.ndarray:
    """Move one group up or down its ladder, and others the other way until the total is about what it was.

    Args:
        levels: int (n_groups,), the rung of each group.
        n_kept: int (n_groups, n_rungs), units of each group on each rung, rising.
        rng: Random generator.

    Returns:
        int (n_groups,), new levels. The total differs by no more than one step of the group that moved first.

    Source:
        Sieberling et al., "EvoPress: Accurate dynamic model compression via evolutionary search", ICML 2025, section 3.
    """
    found = levels.copy()
    direction = 1 if rng.random() < 0.5 else -1
    top = n_kept.shape[1] - 1
    able = np.flatnonzero((levels + direction >= 0) & (levels + direction <= top))
    if not len(able):
        return found
    first = int(rng.choice(able))
    found[first] += direction
    owed = direction * int(n_kept[first, found[first]] - n_kept[first, levels[first]])
    for group in rng.permutation(len(levels)):
        level = found[group] - direction
        if owed <= 0:
            break
        if group == first or not 0 <= level <= top:
            continue
        paid = direction * int(n_kept[group, found[group]] - n_kept[group, level])
        # Paying back more than twice what is owed would leave the total farther off than before.
        if paid <= 2 * owed:
            found[group] = level
            owed -= paid
    return found
