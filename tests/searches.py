"""A cheap analytic loss, and every search on it as tests call them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from paretoprune.fronts import Front
from paretoprune.importance.allocation import allocate, starting_allocations
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import PlainUnits, WeightUnits
from paretoprune.search.corridor import Corridor, anchors_between, choose_anchors, corridors_of
from paretoprune.search.flat import search_flat
from paretoprune.search.phase2 import Guide, search_corridor
from paretoprune.search.problem import Effort, Evaluator, Problem
from paretoprune.search.recorder import HISTORY_COLUMNS, SearchResult
from paretoprune.search.sweep import sweep_allocation
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Flat, Phase1, Phase2

DENSITIES = (0.8, 0.4, 0.2, 0.1)
STARTS = ("uniform", "global_magnitude", "erdos_renyi_kernel")
N_STARTS = len(DENSITIES) * len(STARTS)
ALGORITHMS = ("nsga2", "moead")
SPARSE = ("sparse_ea", "mskea")


class Analytic:
    """A loss that needs no network: each layer lets through the importance it keeps, and layers multiply.

    It records the masks that it evaluates, for the tests.
    """

    def __init__(self, layout: WeightUnits) -> None:
        self.layout = layout
        rng = np.random.default_rng(42)
        self.importance = rng.exponential(size=layout.n_weights) * np.repeat([1.0, 2.0, 0.5], layout.sizes)
        # The scores that a search gets are only roughly the true importance.
        self.scores = self.importance * np.exp(0.5 * rng.standard_normal(layout.n_weights))
        self.seen = PackedMasks.empty(layout.n_weights)

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        self.seen = self.seen.concatenate(masks)
        errors = []
        for i in range(len(masks)):
            kept = self.layout.split(self.importance * masks.unpack(i)).values()
            whole = self.layout.split(self.importance).values()
            errors.append(1 - 0.95 * np.prod([(a.sum() / b.sum()) ** 0.7 for a, b in zip(kept, whole, strict=True)]))
        return np.array(errors)

    def objectives(self, masks: PackedMasks) -> np.ndarray:
        return np.column_stack([self(masks), masks.density]).reshape(-1, 2)

    def booleans(self) -> np.ndarray:
        return np.array([self.seen.unpack(i) for i in range(len(self.seen))])


def starts_of(evaluate: Analytic) -> list[np.ndarray]:
    return starting_allocations(STARTS, DENSITIES, {"magnitude": evaluate.scores}, evaluate.layout)


def split_options(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove some options from others, and return them."""
    return {name: options.pop(name) for name in names if name in options}


def thresholds(evaluate: Analytic, evaluations: int = 90, seed: int = 0, **changed: Any) -> SearchResult:
    """Phase 1; `changed` are settings of it, `starts`, `is_feasible`, `reselect` (of masks), `sparsities`..."""
    starts = changed.pop("starts", starts_of(evaluate))
    problem = Problem(evaluate.layout, evaluate, **split_options(changed, "is_feasible", "costs"))
    effort = Effort(evaluations, changed.pop("population", 12), seed)
    given, sparsities = split_options(changed, "reselect", "precompute"), changed.pop("sparsities", ())
    settings = Phase1(**changed)
    if "reselect" in given:
        reselect = given["reselect"]
        given["reselect"] = lambda front: reselect(front.thinned(settings.n_reselected, sparsities).masks)
    return search_thresholds(problem, evaluate.scores, starts, settings, effort, **given)


def corridor_of(front: Front, layout: WeightUnits) -> Corridor:
    light, heavy = choose_anchors(front, 0.05, 1.0, light_tolerance=0.1, heavy_tolerance=0.8)
    return Corridor.between(front.masks.unpack(light), front.masks.unpack(heavy), layout)


def in_corridor(
    evaluate: Evaluator,
    corridor: Corridor | Sequence[Corridor],
    before: SearchResult,
    guides: Sequence[Guide],
    **changed: Any,
) -> SearchResult:
    """Phase 2; `changed` are settings of it, and `evaluations`, `population`, `seed`, `is_feasible`, `costs`."""
    corridors = [corridor] if isinstance(corridor, Corridor) else list(corridor)
    units = corridors[0].units if corridors else WeightUnits(("a",), ((1,),))
    problem = Problem(units, evaluate, **split_options(changed, "is_feasible", "costs"))
    effort = Effort(changed.pop("evaluations", 90), changed.pop("population", 12), changed.pop("seed", 0))
    settings: dict[str, Any] = {"softness": 0.05, "first_rate": 0.05, "crossover_probability": 0.5}
    return search_corridor(problem, corridors, guides, before, Phase2(**(settings | changed)), effort)


def both_phases(layout: WeightUnits, algorithm: str, seed: int = 0) -> SearchResult:
    evaluate = Analytic(layout)
    before = thresholds(evaluate, seed=seed)
    corridor = corridor_of(before.front, layout)
    return in_corridor(evaluate, corridor, before, [evaluate.scores], algorithm=algorithm, seed=seed)


def flat(evaluate: Evaluator, layout: WeightUnits, **changed: Any) -> SearchResult:
    """The flat search; `changed` are settings of it, and `evaluations`, `population`, `seed`, `is_feasible`."""
    problem = Problem(layout, evaluate, **split_options(changed, "is_feasible", "costs"))
    effort = Effort(changed.pop("evaluations", 90), changed.pop("population", 12), changed.pop("seed", 0))
    return search_flat(problem, Flat(**({"flip_rate": 0.01} | changed)), effort)


def allocation_sweep(evaluate: Analytic) -> SearchResult:
    counts = [allocate("global", evaluate.scores, evaluate.layout, density) for density in DENSITIES]
    return sweep_allocation(Problem(evaluate.layout, evaluate), evaluate.scores, counts)


# Every search by name, as a function of the layout and a seed.
SEARCHES: dict[str, Callable[[WeightUnits, int], SearchResult]] = {
    "thresholds": lambda layout, seed: thresholds(Analytic(layout), seed=seed),
    "corridor nsga2": lambda layout, seed: both_phases(layout, "nsga2", seed),
    "corridor moead": lambda layout, seed: both_phases(layout, "moead", seed),
    "flat nsga2": lambda layout, seed: flat(Analytic(layout), layout, seed=seed),
    "flat moead": lambda layout, seed: flat(Analytic(layout), layout, algorithm="moead", seed=seed),
    "flat sparse_ea": lambda layout, seed: flat(Analytic(layout), layout, algorithm="sparse_ea", seed=seed),
    "flat mskea": lambda layout, seed: flat(Analytic(layout), layout, algorithm="mskea", seed=seed),
}
each_search = pytest.mark.parametrize("name", SEARCHES)


def without_seconds(result: SearchResult) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def same(first: SearchResult, second: SearchResult) -> bool:
    return (
        np.array_equal(first.front.masks.words, second.front.masks.words)
        and np.array_equal(first.front.objectives, second.front.objectives)
        and first.front.stages == second.front.stages
        and without_seconds(first) == without_seconds(second)
    )


def n_distinct(masks: PackedMasks) -> int:
    return len(set(masks.fingerprints()))


def assert_sound(result: SearchResult, layout: WeightUnits) -> None:
    """Check that the front has the objectives of its masks, and that the columns of the history rise."""
    front, history = result.front, result.history
    columns = {name: np.array([row[name] for row in history]) for name in HISTORY_COLUMNS}
    np.testing.assert_array_equal(front.objectives, Analytic(layout).objectives(front.masks))
    assert len(Front.empty(layout.n_weights).merge(front)) == len(front)
    assert np.all(np.diff(front.density) > 0)
    assert [tuple(row) for row in history] == [HISTORY_COLUMNS] * len(history)
    assert columns["generation"].tolist() == list(range(1, len(history) + 1))
    assert np.all(np.diff(columns["evaluations"]) > 0)
    assert np.all(np.diff(columns["seconds"]) >= 0)
    assert np.all(np.diff(columns["hypervolume"]) >= 0)
    assert history[-1]["hypervolume"] == front.hypervolume()


def several(phase1: SearchResult, layout: WeightUnits, n_corridors: int) -> list[Corridor]:
    light, heavy = choose_anchors(phase1.front, 0.05, 1.0, light_tolerance=0.1, heavy_tolerance=0.8)
    anchors = anchors_between(phase1.front, light, heavy, n_corridors)
    return corridors_of(phase1.front.masks.select(anchors), layout)


SEVENTY = PlainUnits(("all",), (70,))
