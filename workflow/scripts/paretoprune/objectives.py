"""Objectives, all of them minimised: one measured loss, and costs that depend on the mask alone.

An evaluator computes the *loss* (error, divergence). A *cost* (density, parameters, ...) is exact, cheap, and known
before the evaluation. So the evaluation may stop as soon as the loss is certain to be too large for that cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units

# Names of the objectives that a front has by default.
ERROR_AND_DENSITY = ("error", "density")
# A loss of 1 adds nothing to a hypervolume. The dense network has the cost 1 and still adds to it.
LOSS_REFERENCE, COST_REFERENCE = 1.0, 1.1


class Cost(Protocol):
    """A cost of masks."""

    @property
    def name(self) -> str:
        """Name of the objective, in files and settings."""
        ...

    def of(self, masks: PackedMasks) -> np.ndarray:
        """Costs relative to the mask that keeps everything, float64 (n_masks,); equal masks have equal costs."""
        ...


@dataclass(frozen=True)
class Density:
    """The share of units that are kept."""

    name: str = "density"

    def of(self, masks: PackedMasks) -> np.ndarray:
        """Densities, float64 (n_masks,), 0 to 1."""
        return masks.density


@dataclass(frozen=True)
class GroupCost:
    """A cost that depends on the number of kept units of each group: a price per unit, and a fixed cost.

    Attributes:
        name: Name of the objective.
        units: The groups.
        prices: float64 (n_groups,), the price of a unit of each group, at least 0.
        fixed: The cost of the mask that keeps nothing, in the unit of the prices, at least 0.

    Raises:
        ValueError: Prices have another shape or are negative, or every mask costs 0.
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
        """Relative costs, float64 (n_masks,), 1 for the mask that keeps everything."""
        full = self.fixed + float(self.prices @ self.units.sizes)
        costs: np.ndarray = (self.fixed + self.units.n_kept(masks) @ self.prices) / full
        return costs


@dataclass(frozen=True)
class UnitCost:
    """The sum of the prices of the kept units.

    Attributes:
        name: Name of the objective.
        prices: float64 (n_units,), the price of each unit, at least 0, not all 0.

    Raises:
        ValueError: Prices are not one-dimensional, negative, or all 0.
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
        """Relative costs, float64 (n_masks,), 1 for the mask that keeps everything."""
        full = float(self.prices.sum())
        return np.array([float(self.prices[masks.unpack(i)].sum()) / full for i in range(len(masks))])


def reference_point(names: Sequence[str]) -> tuple[float, ...]:
    """The reference point of the hypervolume.

    Args:
        names: Names of the objectives, the loss first.

    Returns:
        (1, 1) for a loss and the density, as in all files since the first version; otherwise 1 for the loss and 1.1 for
        each cost.
    """
    if tuple(names[1:]) == ("density",):
        return (1.0, 1.0)
    return (LOSS_REFERENCE, *[COST_REFERENCE] * (len(names) - 1))
