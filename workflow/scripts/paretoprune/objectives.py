"""Objectives, all of them minimised: one measured loss, and costs that follow from a mask alone.

The *loss* (error, divergence) needs an evaluator. A *cost* (density, parameters, ...) is exact, cheap and known before
anything is evaluated, so that evaluating a candidate may stop as soon as its loss is certain to be of no use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units

# Of the objectives that a front has unless it says otherwise.
ERROR_AND_DENSITY = ("error", "density")
# Costs are relative to the dense network, which shall still add to a hypervolume; guessing shall not.
LOSS_REFERENCE, COST_REFERENCE = 1.0, 1.1


class Cost(Protocol):
    """What a mask costs."""

    @property
    def name(self) -> str:
        """Of the objective, as files and settings call it."""
        ...

    def of(self, masks: PackedMasks) -> np.ndarray:
        """Costs relative to the mask that keeps everything, float64 (n_masks,); equal masks cost the same."""
        ...


@dataclass(frozen=True)
class Density:
    """The share of units that is kept."""

    name: str = "density"

    def of(self, masks: PackedMasks) -> np.ndarray:
        """float64 (n_masks,), 0 to 1."""
        return masks.density


@dataclass(frozen=True)
class GroupCost:
    """A cost that grows with the number of kept units of each group.

    Attributes:
        name: Of the objective.
        units: The groups.
        prices: float64 (n_groups,), what a unit of each group costs, at least 0.
        fixed: What the mask that keeps nothing costs, at least 0.
    """

    name: str
    units: Units
    prices: np.ndarray
    fixed: float = 0.0

    def __post_init__(self) -> None:
        prices = np.asarray(self.prices, dtype=np.float64)
        if prices.shape != (self.units.n_groups,) or np.any(prices < 0) or self.fixed < 0:
            raise ValueError(
                f"expected a price of at least 0 for each of {self.units.n_groups} groups and fixed costs of at least "
                f"0, found prices of shape {prices.shape} and fixed costs {self.fixed}"
            )
        if not self.fixed + float(prices @ self.units.sizes):
            raise ValueError(f"cost '{self.name}' is 0 for every mask; give at least one group a price")

    def of(self, masks: PackedMasks) -> np.ndarray:
        """float64 (n_masks,), 1 for the mask that keeps everything."""
        full = self.fixed + float(self.prices @ self.units.sizes)
        found: np.ndarray = (self.fixed + self.units.n_kept(masks) @ self.prices) / full
        return found


@dataclass(frozen=True)
class UnitCost:
    """A cost that is a sum over the kept units, each with a price of its own.

    Attributes:
        name: Of the objective.
        prices: float64 (n_units,), at least 0, not all 0.
    """

    name: str
    prices: np.ndarray

    def __post_init__(self) -> None:
        if self.prices.ndim != 1 or np.any(self.prices < 0) or not np.any(self.prices > 0):
            raise ValueError(
                f"expected a price of at least 0 for each unit and one above 0 of cost '{self.name}', found prices of "
                f"shape {self.prices.shape}"
            )

    def of(self, masks: PackedMasks) -> np.ndarray:
        """float64 (n_masks,), 1 for the mask that keeps everything."""
        full = float(self.prices.sum())
        return np.array([float(self.prices[masks.unpack(i)].sum()) / full for i in range(len(masks))])


def reference_point(names: Sequence[str]) -> tuple[float, ...]:
    """Up to where hypervolume is measured.

    Args:
        names: Of the objectives, the loss first.

    Returns:
        (1, 1) for a loss and the density, as files have had it from the start; otherwise 1 for the loss and 1.1 for
        each cost.
    """
    if tuple(names[1:]) == ("density",):
        return (1.0, 1.0)
    return (LOSS_REFERENCE, *[COST_REFERENCE] * (len(names) - 1))
