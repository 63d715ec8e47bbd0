"""The two phases as one search, without a network: budget, what Phase 2 may not lose, anchors and errors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import PlainUnits
from paretoprune.objectives import Density, UnitCost
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.recorder import SearchResult
from paretoprune.search.two_phase import search, starting_counts
from paretoprune.settings import Anchors, Phase1, Phase2

UNITS = PlainUnits(("a", "b", "c"), (100, 150, 50))
EFFORT = Effort(evaluations=160, population=12, seed=0)


class Profit:
    """A loss that falls with the profit of the kept units; it counts the masks that it evaluates."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.weights = rng.uniform(1, 10, UNITS.n_units)
        self.profits = rng.uniform(1, 10, UNITS.n_units)
        self.estimates = self.profits * rng.lognormal(0, 0.5, UNITS.n_units)
        self.n_evaluated = 0

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        self.n_evaluated += len(masks)
        kept = np.array([self.profits[masks.unpack(i)].sum() for i in range(len(masks))])
        return np.asarray(1 - kept / self.profits.sum())

    def problem(self, n_costs: int = 1, **changed: Any) -> Problem:
        costs = (UnitCost("weight", self.weights), Density())[:n_costs]
        return Problem(UNITS, self, costs, loss="lost profit", **changed)


def found(n_costs: int = 1, effort: Effort = EFFORT, **changed: Any) -> SearchResult:
    profit = Profit()
    return search(profit.problem(n_costs), profit.estimates, effort, **changed)


def same(first: SearchResult, second: SearchResult) -> bool:
    return np.array_equal(first.front.masks.words, second.front.masks.words)


@pytest.mark.parametrize("n_costs", [1, 2])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_the_budget_is_spent_exactly(n_costs: int, share: float) -> None:
    profit = Profit()
    phase1 = Phase1(share=share, start_densities=(0.5, 0.2))
    result = search(profit.problem(n_costs), profit.estimates, EFFORT, phase1=phase1)
    assert profit.n_evaluated == result.history[-1]["evaluations"] == EFFORT.evaluations
    at_phase1 = [row["evaluations"] for row in result.history if row["stage"] != "phase2"]
    assert at_phase1[-1] == round(share * EFFORT.evaluations)


@pytest.mark.parametrize("algorithm", ["nsga2", "moead"])
@pytest.mark.parametrize("n_costs", [1, 2])
@pytest.mark.parametrize("corridors", [0, 1, 3])
def test_phase_2_adds_to_the_front_of_phase_1(algorithm: str, n_costs: int, corridors: int) -> None:
    before = found(n_costs, Effort(80, 12, 0), phase1=Phase1(share=1.0, start_densities=(0.5, 0.2)))
    after = found(
        n_costs,
        phase1=Phase1(start_densities=(0.5, 0.2)),
        anchors=Anchors(corridors=corridors),
        phase2=Phase2(algorithm=algorithm),
    )
    for member in before.front.objectives:
        assert (after.front.objectives <= member).all(axis=1).any()
    assert after.front.hypervolume() > before.front.hypervolume()
    assert "phase2" in after.front.stages


@pytest.mark.parametrize("n_costs", [1, 2])
def test_a_seed_fixes_the_result(n_costs: int) -> None:
    assert same(found(n_costs), found(n_costs))
    assert not same(found(n_costs), found(n_costs, Effort(160, 12, 1)))


def test_three_objectives_have_a_front_in_all_of_them() -> None:
    front = found(2).front
    assert front.names == ("lost profit", "weight", "density")
    np.testing.assert_array_equal(front.objectives[:, 2], front.masks.density)


def test_one_score_and_a_mapping_of_it_are_the_same_and_further_scores_guide_too() -> None:
    profit = Profit()
    problem = profit.problem()
    alone = search(problem, profit.estimates, EFFORT)
    assert same(alone, search(problem, {"estimates": profit.estimates}, EFFORT))
    both = search(problem, {"estimates": profit.estimates, "profits": profit.profits}, EFFORT)
    assert not same(alone, both)
    is_phase1 = [row["stage"] != "phase2" for row in alone.history]
    for first, second, shared in zip(alone.history, both.history, is_phase1, strict=False):
        assert not shared or first["hypervolume"] == second["hypervolume"]


def test_the_best_masks_lie_in_the_corridor_though_keeping_everything_is_bad() -> None:
    """As with features that are noise: all units but a fifth of each group increase the loss."""
    good = np.concatenate([np.arange(size) < size // 5 for size in UNITS.sizes])
    worth = np.where(good, 1 / good.sum(), -0.9 / (~good).sum())

    def loss(masks: PackedMasks) -> np.ndarray:
        return np.array([1 - worth[masks.unpack(i)].sum() for i in range(len(masks))])

    scores = good + np.random.default_rng(0).normal(0, 0.3, UNITS.n_units)
    problem = Problem(UNITS, loss, loss="loss")
    phase1 = search(problem, scores, Effort(200, 20, 0), phase1=Phase1(share=1.0, start_densities=(0.5, 0.2, 0.1)))
    both = search(problem, scores, Effort(400, 20, 0), phase1=Phase1(start_densities=(0.5, 0.2, 0.1)))
    assert both.front.error.min() < phase1.front.error.min()


def test_starts_are_both_ends_and_two_allocations_at_each_density() -> None:
    scores = np.repeat([3.0, 2.0, 1.0], UNITS.sizes)
    everything, nothing, uniform, best = starting_counts(scores, UNITS, [0.5])
    assert everything.tolist() == [100, 150, 50]
    assert nothing.tolist() == [0, 0, 0]
    assert uniform.tolist() == [50, 75, 25]
    assert best.tolist() == [100, 50, 0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "expected at least one importance score, found none"),
        (np.ones(3), r"'importance' for each of 300 units, found shape \(3,\)"),
        ({"ratio": np.full(300, np.nan)}, r"'ratio' for each of 300 units, found shape \(300,\) with 300 values that"),
    ],
)
def test_scores_that_do_not_fit_are_named(scores: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(Profit().problem(), scores, EFFORT)


def test_a_budget_that_pays_for_no_population_and_an_unknown_algorithm_are_refused() -> None:
    with pytest.raises(ValueError, match="Phase 1 needs at least 26 evaluations"):
        found(effort=Effort(40, 12, 0))
    with pytest.raises(ValueError, match="expected an algorithm among"):
        found(phase2=Phase2(algorithm="nsga9"))


def test_without_any_feasible_mask_there_is_no_front() -> None:
    problem = Profit().problem(is_feasible=lambda masks: masks.n_kept > 300)
    with pytest.raises(ValueError, match="Phase 1 front of at least one member, found none"):
        search(problem, Profit().estimates, EFFORT)


def test_from_a_front_of_one_member_all_masks_are_searched() -> None:
    only_everything = Profit().problem(is_feasible=lambda masks: masks.n_kept == 300)
    assert search(only_everything, Profit().estimates, EFFORT).front.objectives.tolist() == [[0.0, 1.0]]
    # As with a dense network that guesses: keeping nothing is as good as keeping anything.
    flat = replace(Profit().problem(), evaluate=lambda masks: np.full(len(masks), 0.5))
    result = search(flat, Profit().estimates, EFFORT)
    assert result.front.objectives.tolist() == [[0.5, 0.0]]
    assert result.history[-1]["evaluations"] == EFFORT.evaluations
    assert result.history[-1]["stage"] == "phase2"
