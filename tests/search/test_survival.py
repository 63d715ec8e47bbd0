"""Stopping early changes nothing: searches on lower bounds find, to the bit, what full ones find."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.objectives import Cost, Density, GroupCost
from paretoprune.search.corridor import Corridor, choose_anchors
from paretoprune.search.flat import search_flat
from paretoprune.search.phase2 import search_corridor
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.search.survival import RankSurvival, least_loss_within
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Flat, Phase1, Phase2

STARTS = [0.9, 0.5, 0.2]


class Plain:
    """Errors that fall with the importance kept, in steps as those of images; counts what it looks at."""

    def __init__(self, layout: WeightUnits, n_images: int = 200) -> None:
        rng = np.random.default_rng(5)
        self.importance = rng.exponential(size=layout.n_weights)
        self.scores = self.importance * np.exp(rng.standard_normal(layout.n_weights))
        self.n_images, self.n_seen, self.n_stopped, self.n_evaluated = n_images, 0, 0, 0

    def full(self, masks: PackedMasks) -> np.ndarray:
        kept = np.array([self.importance[masks.unpack(i)].sum() for i in range(len(masks))]) / self.importance.sum()
        found: np.ndarray = np.round((1 - kept**0.5) * self.n_images) / self.n_images
        return found

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        self.n_evaluated += len(masks)
        self.n_seen += len(masks) * self.n_images
        return self.full(masks)


class Bounded(Plain):
    """The same, stopping at the first error above the bound, or anywhere between that and the truth."""

    def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        truth = self.full(masks)
        stops = truth > bounds
        # The bound of a stopped evaluation: between the given bound and the true loss, different for each mask.
        share = np.modf(truth * 7919 + masks.density * 104729)[0]
        lower = np.floor(bounds * self.n_images + 1e-9) / self.n_images + 1 / self.n_images
        lower = np.where(stops, np.minimum(truth, lower + share * np.maximum(truth - lower, 0)), truth)
        losses = np.where(stops, lower, truth)
        self.n_seen += int(np.round(losses / np.maximum(truth, 1e-9) * self.n_images).sum())
        self.n_evaluated += len(masks)
        self.n_stopped += int(stops.sum())
        assert np.all(losses[stops] > bounds[stops])
        return losses, ~stops


def both_phases(
    evaluate: Plain, layout: WeightUnits, algorithm: str, seed: int, costs: tuple[Cost, ...] = (Density(),)
) -> SearchResult:
    problem = Problem(layout, evaluate, costs)
    counts = [np.ceil(share * layout.sizes).astype(int) for share in STARTS]
    before = search_thresholds(problem, evaluate.scores, counts, Phase1(), Effort(150, 12, seed))
    light, heavy = choose_anchors(before.front, 0.0, 1.0, light_tolerance=0.1, heavy_tolerance=0.8)
    corridor = Corridor.between(before.front.masks.unpack(light), before.front.masks.unpack(heavy), layout)
    guides = [evaluate.scores, evaluate.importance]
    settings = Phase2(algorithm=algorithm, softness=0.05, first_rate=0.05, crossover_probability=0.4)
    return search_corridor(problem, [corridor], guides, before, settings, Effort(300, 12, seed))


def same(a: SearchResult, b: SearchResult) -> bool:
    def rows(found: SearchResult) -> list[tuple[object, ...]]:
        return [tuple(v for k, v in row.items() if k != "seconds") for row in found.history]

    return (
        np.array_equal(a.front.masks.words, b.front.masks.words)
        and np.array_equal(a.front.objectives, b.front.objectives)
        and rows(a) == rows(b)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("algorithm", ["nsga2", "moead"])
def test_both_phases_find_the_same_with_and_without_stopping(layout: WeightUnits, algorithm: str, seed: int) -> None:
    plain, bounded = Plain(layout), Bounded(layout)
    full = both_phases(plain, layout, algorithm, seed)
    assert same(both_phases(bounded, layout, algorithm, seed), full)
    # It did stop, and saw fewer images although some candidates were evaluated twice.
    assert bounded.n_stopped >= 20
    assert bounded.n_seen < plain.n_seen
    assert bounded.n_evaluated - plain.n_evaluated < 0.3 * bounded.n_stopped


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", ["nsga2", "moead"])
def test_with_two_costs_both_phases_find_the_same_with_and_without_stopping(
    layout: WeightUnits, algorithm: str, seed: int
) -> None:
    plain, bounded = Plain(layout), Bounded(layout)
    price = GroupCost("price", layout, np.array([1.0, 5.0, 0.5]), 30.0)
    costs: tuple[Cost, ...] = (Density(), price)
    full = both_phases(plain, layout, algorithm, seed, costs)
    assert same(both_phases(bounded, layout, algorithm, seed, costs), full)
    assert full.front.names == ("error", "density", "price")
    # Of the algorithms, NSGA-III takes every candidate's loss in full.
    assert (bounded.n_stopped > 20) == (algorithm == "moead")


@pytest.mark.parametrize("algorithm", ["nsga2", "moead", "sparse_ea", "mskea"])
@pytest.mark.parametrize("seed", [3, 4])
def test_the_flat_search_finds_the_same_with_and_without_stopping(
    layout: WeightUnits, algorithm: str, seed: int
) -> None:
    plain, bounded = Plain(layout), Bounded(layout)
    found = [
        search_flat(Problem(layout, evaluate), Flat(algorithm=algorithm, flip_rate=0.02), Effort(300, 14, seed))
        for evaluate in (plain, bounded)
    ]
    assert same(*found)
    assert bounded.n_stopped >= 20


def test_a_known_lower_bound_is_completed_when_it_matters(layout: WeightUnits) -> None:
    class Always(RankSurvival):
        def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
            return ~complete

    evaluate = Bounded(layout)
    masks = PackedMasks.pack(np.random.default_rng(0).random((6, layout.n_weights)) < 0.5)
    recorder = Recorder(Problem(layout, evaluate), budget=6, stage="test")
    recorder.survival = Always(np.array([[0.0, 0.0]]), 1)
    objectives, _ = recorder(masks)
    assert evaluate.n_stopped == 6
    assert np.array_equal(objectives, np.column_stack([evaluate.full(masks), masks.density]))
    assert recorder.evaluations == 6


values = st.integers(0, 12).map(lambda v: v / 12)
points = st.lists(st.tuples(values, values), min_size=1, max_size=14)


def test_with_two_costs_only_members_that_cost_no_more_in_both_count() -> None:
    members = np.array([[0.3, 0.2, 0.5], [0.1, 0.5, 0.4], [0.05, 0.8, 0.9]])
    costs = np.array([[0.3, 0.5], [0.6, 0.4], [0.6, 0.45], [0.6, 0.6], [0.9, 0.9], [0.1, 0.9]])
    assert least_loss_within(costs, members).tolist() == [0.3, 0.1, 0.1, 0.1, 0.05, np.inf]


@given(points, points, st.data())
def test_what_ranks_leave_undecided_covers_everything_that_may_survive(
    parents: list[tuple[float, float]], children: list[tuple[float, float]], data: st.DataObject
) -> None:
    from pymoo.algorithms.moo.nsga2 import RankAndCrowding
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem

    before, truth = np.array(parents), np.array(children)
    complete = np.array(data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth))))
    lower = truth.copy()
    lower[:, 0] *= np.where(complete, 1.0, data.draw(values))
    survival = RankSurvival(before, len(before))
    while (undecided := survival.undecided(lower, complete)).any():
        assert not (undecided & complete).any()
        lower[undecided], complete = truth[undecided], complete | undecided

    def survivors(objectives: np.ndarray) -> list[int]:
        merged = np.concatenate([before, objectives])
        individuals = Population.new("X", np.arange(len(merged))[:, None], "F", merged)
        kept = RankAndCrowding().do(
            Problem(n_var=1, n_obj=2), individuals, n_survive=len(before), random_state=np.random.default_rng(1)
        )
        return [int(x) for x in kept.get("X")[:, 0]]

    assert survivors(lower) == survivors(truth)


def test_the_least_loss_counts_members_of_equal_density_and_none_denser() -> None:
    members = np.array([[0.3, 0.2], [0.1, 0.5], [0.05, 0.8]])
    costs = np.array([[0.1], [0.2], [0.49], [0.5], [1.0]])
    assert least_loss_within(costs, members).tolist() == [np.inf, 0.3, 0.3, 0.1, 0.05]
