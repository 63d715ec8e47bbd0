"""What a search works on: units, a loss to measure, costs that are known beforehand, and a budget."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units
from paretoprune.objectives import Cost, Density

# Masks to losses, float64 (n_masks,), minimised; equal masks have equal losses.
Evaluator = Callable[[PackedMasks], np.ndarray]
# Called with each new row of the history.
Progress = Callable[[dict[str, Any]], None]
# Masks to whether each one may be published, bool (n_masks,).
Constraint = Callable[[PackedMasks], np.ndarray]


@runtime_checkable
class BoundedEvaluator(Protocol):
    """An evaluator that can stop early at a mask whose loss is certain to lie above a bound."""

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Compute the losses of masks, float64 (n_masks,)."""
        ...

    def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute the losses of masks, each one up to its bound.

        Args:
            masks: To evaluate.
            bounds: float (n_masks,); infinite where the loss is wanted in full.

        Returns:
            Losses, float64 (n_masks,), and whether each one is complete, bool (n_masks,). A loss that is not complete
            is a lower bound of the true one, and larger than the given bound.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """A search problem: what a mask decides about, and what is minimised.

    Attributes:
        units: What a mask keeps or drops.
        evaluate: Computes the losses of masks; it may be a `BoundedEvaluator`.
        costs: The other objectives, one or two. Anchors, rungs and thinning follow the first one.
        is_feasible: The constraint: which masks may be published. A mask that it forbids is not evaluated: it has the
            loss 1 and never joins a front. None if all masks are feasible.
        progress: Called with each new history row.
        loss: Name of the loss.
        absent: Units that no mask keeps, such as weights that are zero from the beginning: uint64 (n_words,), packed
            like a mask, a bit is 1 if the unit is absent. None if there are none.

    Raises:
        ValueError: There are fewer than two or more than three objectives, or two of them have the same name.
    """

    units: Units
    evaluate: Evaluator
    costs: tuple[Cost, ...] = (Density(),)
    is_feasible: Constraint | None = None
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
    """The budget of a search, the size of its population, and its seed.

    Attributes:
        evaluations: Number of masks to evaluate.
        population: Size of the population.
        seed: Fixes every random draw.
    """

    evaluations: int
    population: int
    seed: int
