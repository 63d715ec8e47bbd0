"""What a search is given: units, a loss to measure, costs that are known, and how much it may spend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units
from paretoprune.objectives import Cost, Density

# Masks to losses, float64 (n_masks,), minimised; equal masks have equal losses.
Evaluate = Callable[[PackedMasks], np.ndarray]
Progress = Callable[[dict[str, Any]], None]
Feasible = Callable[[PackedMasks], np.ndarray]


@runtime_checkable
class BoundedEvaluate(Protocol):
    """An evaluator that can stop evaluating a mask whose loss is certain to lie above a bound."""

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Masks to losses (n,)."""
        ...

    def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks and bounds (n,) to losses (n,) and whether each is complete, bool (n,).

        A loss that is not complete is a lower bound, above the given one.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        units: What a mask keeps or drops.
        evaluate: Measures the loss of masks; it may be a `BoundedEvaluate`.
        costs: The other objectives, at least one; the first is what anchors, ladders and thinning go along.
        is_feasible: Which masks may be published, bool (n,). Others are not evaluated, count as wrong on everything and
            never join a front. None for all.
        progress: Called with each new history row.
        loss: Name of the loss.
        absent: Units that are gone before the search begins, such as weights that are zero already: uint64 (n_words,)
            as in a mask, 1 = never kept. None where there are none.
    """

    units: Units
    evaluate: Evaluate
    costs: tuple[Cost, ...] = (Density(),)
    is_feasible: Feasible | None = None
    progress: Progress | None = None
    loss: str = "error"
    absent: np.ndarray | None = None

    def __post_init__(self) -> None:
        names = self.objectives
        if len(names) not in (2, 3) or len(set(names)) < len(names):
            raise ValueError(
                f"expected a loss and one or two costs, each once, found {', '.join(names)}; name two or three"
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives, the loss first."""
        return (self.loss, *(cost.name for cost in self.costs))

    def costs_of(self, masks: PackedMasks) -> np.ndarray:
        """Costs of masks, float64 (n_masks, n_costs)."""
        return np.column_stack([cost.of(masks) for cost in self.costs]).reshape(len(masks), len(self.costs))


@dataclass(frozen=True)
class Effort:
    """How much a search may spend, and its luck.

    Attributes:
        evaluations: Number of masks to evaluate.
        population: Size of the population.
        seed: Fixes every draw.
    """

    evaluations: int
    population: int
    seed: int
