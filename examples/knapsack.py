"""A knapsack of 10,000 items: which items to pack, for every possible weight limit.

Profit should be high and weight low. There is no limit, as the front has an answer for each one. Sorting by the true
ratio of profit to weight would nearly solve the problem, but only estimates of it are known. Each estimate is wrong by
a factor of its own, and by a factor that all items of a kind share. So the order is roughly right within a kind, but
not between kinds.

Run it from the root of the repository: `PYTHONPATH=workflow/scripts python -m examples.knapsack`
"""

from dataclasses import dataclass

import numpy as np
from paretoprune.fronts import hypervolume
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import PlainUnits
from paretoprune.objectives import UnitCost
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.recorder import SearchResult

from examples.comparison import compare, table

N_KINDS = 20


@dataclass(frozen=True)
class Knapsack:
    """Items; those of a kind lie side by side.

    Attributes:
        weights: float64 (n_items,).
        profits: float64 (n_items,), larger for heavy items on average.
        estimates: float64 (n_items,), estimates of the ratio of profit to weight.
    """

    weights: np.ndarray
    profits: np.ndarray
    estimates: np.ndarray

    @classmethod
    def draw(cls, n_items: int, seed: int) -> "Knapsack":
        """Draw a random knapsack; `n_items` is a multiple of the number of kinds."""
        rng = np.random.default_rng(seed)
        weights = rng.uniform(1, 100, n_items)
        ratios = rng.lognormal(0, 0.7, n_items)
        off_by_kind = np.repeat(rng.lognormal(0, 0.7, N_KINDS), n_items // N_KINDS)
        return cls(weights, ratios * weights, ratios * rng.lognormal(0, 0.5, n_items) * off_by_kind)

    def lost_profit(self, masks: PackedMasks) -> np.ndarray:
        """The share of all profit that is not packed, float64 (n_masks,)."""
        packed = np.array([self.profits[masks.unpack(i)].sum() for i in range(len(masks))])
        return np.asarray(1 - packed / self.profits.sum())

    def problem(self) -> Problem:
        """The search problem: one bit per item, lost profit against weight."""
        n_each = len(self.weights) // N_KINDS
        kinds = PlainUnits(tuple(f"kind {i}" for i in range(N_KINDS)), (n_each,) * N_KINDS)
        return Problem(kinds, self.lost_profit, (UnitCost("weight", self.weights),), loss="lost profit")

    def best_hypervolume(self, reference: tuple[float, ...]) -> float:
        """The hypervolume of packing items in the order of their true ratios, which is close to the best possible."""
        order = np.argsort(-self.profits / self.weights)
        lost = 1 - np.cumsum(self.profits[order]) / self.profits.sum()
        return hypervolume(np.column_stack([lost, np.cumsum(self.weights[order]) / self.weights.sum()]), reference)


def run(n_items: int, effort: Effort) -> tuple[Knapsack, dict[str, SearchResult]]:
    """Draw a knapsack and run all methods on it; results by method."""
    knapsack = Knapsack.draw(n_items, effort.seed)
    return knapsack, compare(knapsack.problem(), knapsack.estimates, effort)


def main() -> None:
    """Search three knapsacks with 2000 evaluations each, and print the table of docs/problems.md."""
    results = [run(10_000, Effort(evaluations=2000, population=80, seed=seed)) for seed in range(3)]
    names = list(results[0][1])
    rows = {name: [found[name].front.hypervolume() for _, found in results] for name in names}
    print(table("hypervolume", rows, gains=True))
    best = [knapsack.best_hypervolume(found[names[0]].front.reference) for knapsack, found in results]
    print(table("", {"sorted by true profit by weight": best}).splitlines()[1])


if __name__ == "__main__":
    main()
