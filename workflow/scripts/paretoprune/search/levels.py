"""Rungs: the densities that a group may have, and moves between them at constant total density.

A *level* is the index of a group's rung, from 0 for the sparsest one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

# Sparsest rung, as a share of a group.
LOWEST_RUNG = 0.005


@dataclass(frozen=True)
class Ladder:
    """Rungs, and what each group amounts to on each of them, for moves at a constant total.

    Attributes:
        densities: float (n_rungs,), rising.
        amounts: int64 (n_groups, n_rungs), rising: the units that a group keeps, or what they cost.
    """

    densities: np.ndarray
    amounts: np.ndarray

    @classmethod
    def of_units(cls, densities: np.ndarray, sizes: np.ndarray) -> "Ladder":
        """The ladder whose total is the number of units, of groups of these sizes."""
        return cls(densities, np.rint(densities * sizes[:, None]).astype(np.int64))


def rung_densities(n_rungs: int) -> np.ndarray:
    """The densities that a group may have, float (n_rungs,): evenly spaced in their logarithm, rising to 1."""
    return np.geomspace(LOWEST_RUNG, 1.0, n_rungs)


def nearest_rungs(densities: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """The index of the rung that is nearest to each density, in the logarithm; int64, the shape of `densities`.

    Args:
        densities: Any shape, 0 to 1.
        rungs: float (n_rungs,), rising, above 0.
    """
    # Halfway between two rungs in the logarithm is their geometric mean.
    boundaries = np.sqrt(rungs[1:] * rungs[:-1])
    return np.searchsorted(boundaries, densities, side="left")


def switch_levels(levels: np.ndarray, amounts: np.ndarray, rng: Generator) -> np.ndarray:
    """Move one group to the next rung, and others the other way until the total is about the same as before.

    Args:
        levels: int (n_groups,), the level of each group.
        amounts: int (n_groups, n_rungs), what each group amounts to on each rung, rising.
        rng: Random generator.

    Returns:
        int (n_groups,), new levels. The total differs by no more than one step of the group that moved first.

    Source:
        Sieberling et al., "EvoPress: Accurate dynamic model compression via evolutionary search", ICML 2025, section 3.
    """
    switched = levels.copy()
    direction = 1 if rng.random() < 0.5 else -1
    top = amounts.shape[1] - 1
    movable = np.flatnonzero((levels + direction >= 0) & (levels + direction <= top))
    if not len(movable):
        return switched
    first = int(rng.choice(movable))
    switched[first] += direction
    # By how much the total is off, counted in the direction of the first group.
    excess = direction * int(amounts[first, switched[first]] - amounts[first, levels[first]])
    for group in rng.permutation(len(levels)):
        level = switched[group] - direction
        if excess <= 0:
            break
        if group == first or not 0 <= level <= top:
            continue
        compensated = direction * int(amounts[group, switched[group]] - amounts[group, level])
        # A step of more than twice the excess would leave the total farther off than before, on the other side.
        if compensated <= 2 * excess:
            switched[group] = level
            excess -= compensated
    return switched
