"""Phase 1: budget, starts, rungs, members chosen anew."""

import numpy as np
import pytest
from paretoprune.fronts import hypervolume
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import PlainUnits, WeightUnits, keep_top, ranks_within_groups
from paretoprune.search.levels import Ladder, nearest_rungs, rung_densities
from paretoprune.search.problem import Problem
from paretoprune.search.pymoo_adapter import PruningProblem
from paretoprune.search.recorder import Recorder
from paretoprune.search.thresholds import LevelSwitches
from pymoo.operators.mutation.pm import PM
from searches import N_STARTS, Analytic, assert_sound, n_distinct, starts_of, thresholds


@pytest.mark.parametrize("evaluations", [24, 30, 37, 90])
def test_phase_1_spends_its_budget_exactly_and_evaluates_each_mask_once(evaluations: int, evaluate: Analytic) -> None:
    result = thresholds(evaluate, evaluations)
    assert n_distinct(evaluate.seen) == len(evaluate.seen)
    assert len(evaluate.seen) == result.history[-1]["evaluations"] == evaluations


def test_phase_1_never_exceeds_its_budget_where_many_thresholds_give_the_same_mask() -> None:
    tiny = WeightUnits(("a", "b", "c"), ((3,), (2,), (2,)))
    evaluate = Analytic(tiny)
    # Thresholds can only encode 4 * 3 * 3 masks.
    result = thresholds(evaluate, 60, starts=[])
    assert n_distinct(evaluate.seen) == len(evaluate.seen) <= 36
    assert result.history[-1]["evaluations"] == len(evaluate.seen)


def test_no_starting_allocation_dominates_the_front_of_phase_1(evaluate: Analytic) -> None:
    starts, ranks = starts_of(evaluate), ranks_within_groups(evaluate.scores, evaluate.layout)
    result = thresholds(evaluate)
    masks = np.array([keep_top(ranks, counts, evaluate.layout) for counts in starts])
    evaluated = Analytic(evaluate.layout).objectives(PackedMasks.pack(masks))
    np.testing.assert_array_equal(evaluate.booleans()[:N_STARTS], masks)
    for start in evaluated:
        assert any(np.all(member <= start) for member in result.front.objectives)
        assert not any(np.all(start <= member) and np.any(start < member) for member in result.front.objectives)
    assert result.front.hypervolume() > hypervolume(evaluated)
    assert result.history[0]["hypervolume"] == pytest.approx(hypervolume(evaluated), abs=1e-12)


def test_phase_1_says_which_members_were_there_from_the_start(evaluate: Analytic) -> None:
    result = thresholds(evaluate)
    assert set(result.front.stages) == {"start", "phase1"}
    assert [row["stage"] for row in result.history] == ["start"] + ["phase1"] * (len(result.history) - 1)
    assert result.history[0]["evaluations"] == N_STARTS


def test_masks_of_phase_1_keep_the_best_ranked_of_each_layer(evaluate: Analytic) -> None:
    thresholds(evaluate)
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    for mask, counts in zip(evaluate.booleans(), evaluate.layout.n_kept(evaluate.seen), strict=True):
        np.testing.assert_array_equal(mask, keep_top(ranks, counts, evaluate.layout))


def test_phase_1_works_without_starts(evaluate: Analytic) -> None:
    result = thresholds(evaluate, starts=[])
    assert set(result.front.stages) == {"phase1"}
    assert_sound(result, evaluate.layout)


def test_a_budget_that_does_not_pay_for_the_first_population_is_refused(evaluate: Analytic) -> None:
    with pytest.raises(ValueError, match=r"needs at least 24 evaluations \(12 starting .* 12\), found 23; raise"):
        thresholds(evaluate, 23)
    assert len(evaluate.seen) == 0


def starting_masks(evaluate: Analytic) -> np.ndarray:
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    return np.array([keep_top(ranks, counts, evaluate.layout) for counts in starts_of(evaluate)])


@pytest.mark.parametrize("level_switches", [0.0, 0.5, 1.0])
def test_on_rungs_starts_are_evaluated_as_they_are_and_candidates_use_rungs_only(
    level_switches: float, evaluate: Analytic
) -> None:
    result = thresholds(evaluate, rungs=7, level_switches=level_switches)
    masks, layout = evaluate.booleans(), evaluate.layout
    np.testing.assert_array_equal(masks[:N_STARTS], starting_masks(evaluate))
    rungs = np.rint(rung_densities(7) * layout.sizes[:, None]).astype(int)
    counts = layout.n_kept(evaluate.seen)[N_STARTS:]
    assert len(counts) > 0
    for layer in range(layout.n_groups):
        assert set(counts[:, layer]) <= set(rungs[layer])
        assert len(set(counts[:, layer])) > 2
    # Without rungs that is not so.
    free = Analytic(layout)
    thresholds(free)
    assert not set(layout.n_kept(free.seen)[N_STARTS:, 1]) <= set(rungs[1])
    assert result.history[-1]["evaluations"] == len(evaluate.seen) == n_distinct(evaluate.seen) == 90
    assert_sound(result, layout)


def test_what_rungs_need_is_told_before_anything_is_evaluated(evaluate: Analytic) -> None:
    told: list[PackedMasks] = []

    def precompute(masks: PackedMasks) -> None:
        assert len(evaluate.seen) == 0
        told.append(masks)

    thresholds(evaluate, rungs=5, precompute=precompute)
    (masks,) = told
    expected = np.rint(rung_densities(5)[:, None] * evaluate.layout.sizes)
    np.testing.assert_array_equal(evaluate.layout.n_kept(masks), expected)
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    np.testing.assert_array_equal(masks.unpack(2), keep_top(ranks, expected[2].astype(int), evaluate.layout))
    thresholds(Analytic(evaluate.layout), precompute=lambda masks: told.append(masks))
    assert len(told) == 1


def test_rungs_reach_from_the_sparsest_rung_to_the_dense_layer() -> None:
    rungs = rung_densities(24)
    assert len(rungs) == 24
    assert (rungs[0], rungs[-1]) == (pytest.approx(0.005), 1.0)
    np.testing.assert_allclose(np.diff(np.log(rungs)), np.log(200) / 23)


def test_level_switches_vary_the_share_asked_for_and_keep_the_total() -> None:
    sizes, rungs = np.array([1000, 5000, 3000, 800]), rung_densities(9)
    units = PlainUnits(("a", "b", "c", "d"), tuple(sizes.tolist()))
    recorder = Recorder(Problem(units, lambda m: m.density), budget=1, stage="")
    problem = PruningProblem(4, lambda x: PackedMasks.empty(units.n_units), recorder, bounds=(0, 1))
    levels = np.random.default_rng(0).integers(1, 8, (2000, 4))
    x = 1.0 - rungs[levels]
    ladder = Ladder.of_units(rungs, sizes)
    unchanged = LevelSwitches(ladder, 0.0, PM(prob_var=0.0))
    np.testing.assert_array_equal(unchanged._do(problem, x, random_state=np.random.default_rng(0)), x)
    for share in (0.3, 1.0):
        mutation = LevelSwitches(ladder, share, PM(prob_var=0.0))
        before = x.copy()
        found = mutation._do(problem, x, random_state=np.random.default_rng(1))
        np.testing.assert_array_equal(x, before)
        changed = (found != x).any(axis=1)
        assert changed.mean() == pytest.approx(share, abs=0.04)
        after = nearest_rungs(1.0 - found, rungs)
        np.testing.assert_allclose(found, 1.0 - rungs[after], atol=1e-12)
        assert np.abs(after - levels).max() == 1
        counts = np.rint(rungs * sizes[:, None]).astype(int)
        totals = [counts[np.arange(4), rows].sum(axis=1) for rows in (levels, after)]
        steps = np.abs(counts[np.arange(4), after] - counts[np.arange(4), levels]).max(axis=1)
        assert np.all(np.abs(totals[1] - totals[0]) <= steps)


@pytest.mark.parametrize("rungs", [None, 7])
@pytest.mark.parametrize("n_reselected", [0, 1, 5])
def test_members_chosen_anew_are_evaluated_within_the_budget(
    n_reselected: int, rungs: int | None, evaluate: Analytic
) -> None:
    given: list[PackedMasks] = []

    def better(masks: PackedMasks) -> PackedMasks:
        """Keep as many units of each group, but by their true importance."""
        given.append(masks)
        ranks = ranks_within_groups(evaluate.importance, evaluate.layout)
        rows = [keep_top(ranks, counts, evaluate.layout) for counts in evaluate.layout.n_kept(masks)]
        return PackedMasks.pack_each(rows, masks.n_units)

    result = thresholds(evaluate, 60, rungs=rungs, n_reselected=n_reselected, reselect=better)
    assert len(evaluate.seen) == n_distinct(evaluate.seen) == result.history[-1]["evaluations"] == 60
    assert_sound(result, evaluate.layout)
    if not n_reselected:
        assert given == []
        return
    (masks,) = given
    assert len(masks) == n_reselected
    assert result.history[-1]["stage"] == "reselected"
    assert "reselected" in result.front.stages
    assert result.history[-1]["evaluations"] - result.history[-2]["evaluations"] == n_reselected
    assert result.history[-1]["hypervolume"] > result.history[-2]["hypervolume"]


def test_the_best_members_beyond_given_sparsities_are_chosen_anew(evaluate: Analytic) -> None:
    given: list[PackedMasks] = []

    def as_they_are(masks: PackedMasks) -> PackedMasks:
        given.append(masks)
        return masks

    result = thresholds(evaluate, 60, n_reselected=3, sparsities=[0.3, 0.62, 0.85], reselect=as_they_are)
    density = result.front.density
    (masks,) = given
    assert masks.density.tolist() == sorted(max(d for d in density if d <= 1 - s) for s in (0.3, 0.62, 0.85))


def test_members_that_come_back_as_they_were_cost_nothing(evaluate: Analytic) -> None:
    result = thresholds(evaluate, 60, n_reselected=5, reselect=lambda masks: masks)
    assert len(evaluate.seen) == result.history[-1]["evaluations"] == 55
    # Without a function that chooses anew, the search gets the whole budget.
    assert len(Analytic(evaluate.layout).seen) == 0
    other = Analytic(evaluate.layout)
    thresholds(other, 60, n_reselected=5)
    assert len(other.seen) == 60


def test_the_budget_must_pay_for_members_chosen_anew_too(evaluate: Analytic) -> None:
    with pytest.raises(ValueError, match=r"at least 27 evaluations .* a population of 12 and 3 members chosen anew\)"):
        thresholds(evaluate, 26, n_reselected=3, reselect=lambda masks: masks)
    assert len(evaluate.seen) == 0
