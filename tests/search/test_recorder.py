"""The recorder: each mask once, in order, within the budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.objectives import GroupCost
from paretoprune.search.problem import Problem
from paretoprune.search.recorder import HISTORY_COLUMNS, BudgetSpentError, Recorder, SearchResult, read_history
from paretoprune.search.sweep import sweep_allocation
from searches import SEVENTY, Analytic, corridor_of, flat, in_corridor, same, several, starts_of, thresholds


def test_the_recorder_answers_from_memory_and_in_order(evaluate: Analytic) -> None:
    rng = np.random.default_rng(0)
    masks = PackedMasks.pack(rng.random((4, evaluate.layout.n_weights)) < [[0.2], [0.4], [0.6], [0.8]])
    recorder = Recorder(Problem(evaluate.layout, evaluate), budget=10, stage="flat")
    first, _ = recorder(masks.select([1, 0, 1]))
    second, _ = recorder(masks.select([3, 1, 2]))
    expected = Analytic(evaluate.layout).objectives(masks)
    np.testing.assert_array_equal(first, expected[[1, 0, 1]])
    np.testing.assert_array_equal(second, expected[[3, 1, 2]])
    assert sorted(evaluate.seen.fingerprints()) == sorted(masks.fingerprints())
    assert (recorder.evaluations, recorder.remaining) == (4, 6)


def test_the_recorder_evaluates_as_many_masks_as_the_budget_pays_for(evaluate: Analytic) -> None:
    n = evaluate.layout.n_weights
    masks = PackedMasks.pack(np.arange(n) < np.arange(1, 6)[:, None])
    recorder = Recorder(Problem(evaluate.layout, evaluate), budget=3, stage="flat")
    recorder(masks.select([0, 1]))
    with pytest.raises(BudgetSpentError):
        recorder(masks)
    recorder.close_generation()
    assert len(evaluate.seen) == recorder.evaluations == recorder.result().history[-1]["evaluations"] == 3
    assert recorder(masks.select([1, 0]))[0].shape == (2, 2)


def test_the_recorder_tells_which_masks_newly_joined_the_front() -> None:
    losses = {1: 0.5, 2: 0.6, 3: 0.1}
    masks = PackedMasks.pack(np.arange(70) < np.array([[1], [2], [3]]))
    recorder = Recorder(Problem(SEVENTY, lambda m: np.array([losses[n] for n in m.n_kept])), budget=9, stage="flat")
    assert recorder(masks)[1].tolist() == [True, False, True]
    assert recorder(masks)[1].tolist() == [False, False, False]


def test_a_generation_without_a_new_mask_adds_no_row(evaluate: Analytic) -> None:
    told: list[dict[str, Any]] = []
    n = evaluate.layout.n_weights
    recorder = Recorder(Problem(evaluate.layout, evaluate, progress=told.append), budget=10, stage="flat")
    recorder.close_generation()
    recorder(PackedMasks.pack(np.ones((1, n), dtype=bool)))
    recorder.close_generation()
    recorder(PackedMasks.pack(np.ones((1, n), dtype=bool)))
    recorder.close_generation()
    assert told == recorder.result().history
    assert [(row["generation"], row["evaluations"]) for row in told] == [(1, 1)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda n: np.full(n, np.nan), r"shape \(3,\) with 3 values that are not finite"),
        (lambda n: np.array([0.5, np.inf, 0.1]), r"shape \(3,\) with 1 values that are not finite"),
        (lambda n: np.zeros((n, 2)), r"shape \(3, 2\)"),
        (lambda n: np.zeros(n - 1), r"shape \(2,\)"),
    ],
)
def test_losses_that_are_not_finite_or_not_one_a_mask_are_refused(
    answer: Callable[[int], np.ndarray], found: str, layout: WeightUnits
) -> None:
    masks = PackedMasks.pack(np.arange(layout.n_weights) < np.array([[1], [2], [3]]))
    recorder = Recorder(Problem(layout, lambda m: answer(len(m))), budget=9, stage="flat")
    with pytest.raises(ValueError, match=rf"expected finite losses of shape \(3,\) .* found {found}"):
        recorder(masks)
    assert len(recorder.front) == recorder.evaluations == 0


def test_a_search_stops_at_objectives_that_are_not_finite(layout: WeightUnits) -> None:
    def broken(masks: PackedMasks) -> np.ndarray:
        return np.where(masks.density < 0.5, np.nan, 0.1)

    with pytest.raises(ValueError, match="values that are not finite"):
        flat(broken, layout)


def even(masks: PackedMasks) -> np.ndarray:
    return masks.n_kept % 2 == 0


@pytest.mark.parametrize("name", ["thresholds", "rungs", "corridor", "corridors", "moead", "flat", "allocation"])
def test_infeasible_masks_are_neither_evaluated_nor_published(name: str, layout: WeightUnits) -> None:
    evaluate = Analytic(layout)
    before = thresholds(evaluate, is_feasible=even)
    corridor = corridor_of(before.front, layout)
    searches: dict[str, Callable[[], SearchResult]] = {
        "thresholds": lambda: before,
        "rungs": lambda: thresholds(evaluate, is_feasible=even, rungs=9, level_switches=0.5),
        "corridor": lambda: in_corridor(evaluate, corridor, before, [evaluate.scores], is_feasible=even),
        "corridors": lambda: in_corridor(
            evaluate, several(before, layout, 2), before, [evaluate.scores], is_feasible=even, evaluations=60
        ),
        "moead": lambda: in_corridor(
            evaluate, corridor, before, [evaluate.scores], is_feasible=even, algorithm="moead"
        ),
        "flat": lambda: flat(evaluate, layout, is_feasible=even),
        "allocation": lambda: sweep_allocation(
            Problem(layout, evaluate, is_feasible=even), evaluate.scores, starts_of(evaluate)
        ),
    }
    result = searches[name]()
    assert len(result.front) > 0
    assert even(evaluate.seen).all()
    assert even(result.front.masks).all()


def test_an_infeasible_mask_has_the_loss_of_being_wrong_on_every_image() -> None:
    masks = PackedMasks.pack(np.arange(70) < np.array([[3], [4], [5]]))
    evaluated: list[int] = []

    def evaluate(masks: PackedMasks) -> np.ndarray:
        evaluated.extend(masks.n_kept.tolist())
        return np.full(len(masks), 0.25)

    recorder = Recorder(Problem(SEVENTY, evaluate, is_feasible=even), budget=9, stage="flat")
    objectives, joined = recorder(masks)
    assert evaluated == [4]
    assert objectives.tolist() == [[1.0, 3 / 70], [0.25, 4 / 70], [1.0, 5 / 70]]
    assert joined.tolist() == [False, True, False]
    assert recorder.evaluations == 3
    assert recorder.front.masks.n_kept.tolist() == [4]
    again, joined = recorder(masks)
    np.testing.assert_array_equal(again, objectives)
    assert not joined.any()
    assert (evaluated, recorder.evaluations) == ([4], 3)
    nowhere = Problem(SEVENTY, evaluate, is_feasible=lambda masks: np.zeros(len(masks), dtype=bool))
    nothing = Recorder(nowhere, budget=9, stage="flat")
    nothing(masks)
    assert len(nothing.front) == 0
    assert evaluated == [4]


def test_a_history_reads_back_as_it_was_written(tmp_path: Path, phase1: SearchResult) -> None:
    write_csv(tmp_path / "history.csv", phase1.history, HISTORY_COLUMNS)
    assert read_history(tmp_path / "history.csv") == phase1.history


def test_a_search_from_files_continues_as_one_from_memory(
    tmp_path: Path, layout: WeightUnits, phase1: SearchResult
) -> None:
    phase1.front.save(tmp_path / "front.npz")
    write_csv(tmp_path / "history.csv", phase1.history, HISTORY_COLUMNS)
    from_files = SearchResult(Front.load(tmp_path / "front.npz"), read_history(tmp_path / "history.csv"))
    corridor, guide = corridor_of(phase1.front, layout), Analytic(layout).scores
    assert same(
        in_corridor(Analytic(layout), corridor, from_files, [guide]),
        in_corridor(Analytic(layout), corridor, phase1, [guide]),
    )


def test_a_search_of_other_objectives_is_not_continued(evaluate: Analytic, phase1: SearchResult) -> None:
    price = GroupCost("price", evaluate.layout, np.ones(3))
    with pytest.raises(ValueError, match="expected to continue a search of error, price, found one of error, density"):
        Recorder(Problem(evaluate.layout, evaluate, (price,)), budget=9, stage="phase2", previous=phase1)
    assert len(evaluate.seen) == 0


def test_absent_units_count_as_dropped_whatever_a_mask_says() -> None:
    absent = np.arange(70) < 30
    seen: list[np.ndarray] = []

    def evaluate(masks: PackedMasks) -> np.ndarray:
        seen.extend(masks.unpack(i) for i in range(len(masks)))
        return 1 - masks.n_kept / 70

    masks = PackedMasks.pack(np.array([np.ones(70, dtype=bool), ~absent, np.arange(70) < 50]))
    recorder = Recorder(Problem(SEVENTY, evaluate, absent=PackedMasks.pack(absent).words[0]), budget=9, stage="flat")
    objectives, joined = recorder(masks)
    # Without absent units the first two are equal and evaluated once; the third keeps 20 of the other units.
    assert recorder.evaluations == len(seen) == 2
    assert not any((kept & absent).any() for kept in seen)
    np.testing.assert_allclose(objectives, [[30 / 70, 40 / 70], [30 / 70, 40 / 70], [50 / 70, 20 / 70]])
    assert joined.tolist() == [True, True, True]
    np.testing.assert_allclose(recorder.front.density, [20 / 70, 40 / 70])
