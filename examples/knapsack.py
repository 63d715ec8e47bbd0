"""A knapsack of 10,000 items: which items to pack, for every weight that one may carry.

Profit shall be high and weight low; there is no limit, as the front answers for every limit. Dividing true profits by
weights and sorting would all but solve it. What is known beforehand are estimates, each of which is off by itself and
by a factor that is common to all items of a kind: within a kind the order is roughly right, between kinds it is not.

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
    """Items in kinds, side by side.

    Attributes:
        weights: float64 (n_items,).
        profits: float64 (n_items,); dear items are heavy ones, but not only.
        estimates: float64 (n_items,), of profit by weight.
    """

    weights: np.ndarray
    profits: np.ndarray
    estimates: np.ndarray

    @classmethod
    def draw(cls, n_items: int, seed: int) -> "Knapsack":
        """A random one; `n_items` is a multiple of the number of kinds."""
        rng = np.random.default_rng(seed)
        weights = rng.uniform(1, 100, n_items)
        ratios = rng.lognormal(0, 0.7, n_items)
        off_by_kind = np.repeat(rng.lognormal(0, 0.7, N_KINDS), n_items // N_KINDS)
        return cls(weights, ratios * weights, ratios * rng.lognormal(0, 0.5, n_items) * off_by_kind)

    def lost_profit(self, masks: PackedMasks) -> np.ndarray:
        """The share of all profit that is left behind, float64 (n_masks,)."""
        packed = np.array([self.profits[masks.unpack(i)].sum() for i in range(len(masks))])
        return np.asarray(1 - packed / self.profits.sum())

    def problem(self) -> Problem:
        """A bit per item, lost profit against weight."""
        n_each = len(self.weights) // N_KINDS
        kinds = PlainUnits(tuple(f"kind {i}" for i in range(N_KINDS)), (n_each,) * N_KINDS)
        return Problem(kinds, self.lost_profit, (UnitCost("weight", self.weights),), loss="lost profit")

    def best_hypervolume(self, reference: tuple[float, ...]) -> float:
        """That of packing by the true ratios, one item after the other: what a perfect search would come close to."""
        order = np.argsort(-self.profits / self.weights)
        lost = 1 - np.cumsum(self.profits[order]) / self.profits.sum()
        return hypervolume(np.column_stack([lost, np.cumsum(self.weights[order]) / self.weights.sum()]), reference)


def run(n_items: int, effort: Effort) -> tuple[Knapsack, dict[str, SearchResult]]:
    """A knapsack, and what each method finds."""
    knapsack = Knapsack.draw(n_items, effort.seed)
    return knapsack, compare(knapsack.problem(), knapsack.estimates, effort)


def main() -> None:
    """Three knapsacks, each searched with 2000 evaluations."""
    results = [run(10_000, Effort(evaluations=2000, population=80, seed=seed)) for seed in range(3)]
    names = list(results[0][1])
    rows = {name: [found[name].front.hypervolume() for _, found in results] for name in names}
    print(table("hypervolume", rows, gains=True))
    best = [knapsack.best_hypervolume(found[names[0]].front.reference) for knapsack, found in results]
    print(table("", {"sorted by true profit by weight": best}).splitlines()[1])


if __name__ == "__main__":
    main()
