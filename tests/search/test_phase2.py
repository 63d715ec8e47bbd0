"""Phase 2: the corridor, budget, guides, and turns of several corridors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks, unpack_row
from paretoprune.search.corridor import Corridor
from paretoprune.search.groups import CandidateRanking
from paretoprune.search.phase2 import WAITING_TURN, take_turns
from paretoprune.search.recorder import SearchResult
from searches import (
    ALGORITHMS,
    Analytic,
    assert_sound,
    corridor_of,
    flat,
    in_corridor,
    n_distinct,
    same,
    several,
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(3))
def test_the_evaluator_never_sees_a_mask_outside_the_corridor(
    algorithm: str, seed: int, evaluate: Analytic, phase1: SearchResult
) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    in_corridor(evaluate, corridor, phase1, [evaluate.scores], algorithm=algorithm, seed=seed)
    masks = evaluate.booleans()
    n = evaluate.layout.n_weights
    assert masks[:, unpack_row(corridor.lower, n)].all()
    assert not masks[:, ~unpack_row(corridor.upper, n)].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("evaluations", [5, 12, 41, 90])
def test_phase_2_spends_its_budget_exactly_and_evaluates_each_mask_once(
    algorithm: str, evaluations: int, evaluate: Analytic, phase1: SearchResult
) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    settings = {"algorithm": algorithm, "evaluations": evaluations}
    result = in_corridor(evaluate, corridor, phase1, [evaluate.scores], **settings)
    assert n_distinct(evaluate.seen) == len(evaluate.seen)
    assert not set(evaluate.seen.fingerprints()) & set(phase1.front.masks.fingerprints())
    assert result.history[-1]["evaluations"] == phase1.history[-1]["evaluations"] + len(evaluate.seen)
    assert len(evaluate.seen) == evaluations


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_corridor_of_a_few_bits_is_searched_until_it_runs_dry(algorithm: str, evaluate: Analytic) -> None:
    heavy = np.arange(evaluate.layout.n_weights) % 3 == 0
    light = heavy.copy()
    light[[1, 200, 350]] = True
    masks = PackedMasks.pack(np.array([heavy, light]))
    before = SearchResult(Front(masks, evaluate.objectives(masks), ["phase1"] * 2), [])
    evaluate.seen = PackedMasks.empty(evaluate.layout.n_weights)
    corridor = Corridor.between(light, heavy, evaluate.layout)
    in_corridor(evaluate, corridor, before, [evaluate.scores], algorithm=algorithm, evaluations=500)
    assert n_distinct(evaluate.seen) == len(evaluate.seen) <= 2**3 - 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(3))
def test_phase_2_never_loses_what_phase_1_found(
    algorithm: str, seed: int, evaluate: Analytic, phase1: SearchResult
) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    settings: dict[str, Any] = {"algorithm": algorithm, "seed": seed}
    result = in_corridor(evaluate, corridor, phase1, [evaluate.scores], **settings)
    assert result.front.hypervolume() >= phase1.front.hypervolume()
    for member in phase1.front.objectives:
        assert any(np.all(found <= member) for found in result.front.objectives)
    # Guided by what truly matters, a bit per weight must find what thresholds on rough scores cannot.
    guided = in_corridor(evaluate, corridor, phase1, [evaluate.importance], **settings)
    assert guided.front.hypervolume() > phase1.front.hypervolume() + 0.001
    assert "phase2" in guided.front.stages


def test_phase_2_continues_the_history_and_leaves_phase_1_as_it_was(evaluate: Analytic, phase1: SearchResult) -> None:
    history, n_members = [dict(row) for row in phase1.history], len(phase1.front)
    result = in_corridor(evaluate, corridor_of(phase1.front, evaluate.layout), phase1, [evaluate.scores])
    assert result.history[: len(history)] == history == phase1.history
    assert len(phase1.front) == n_members
    assert {row["stage"] for row in result.history[len(history) :]} == {"phase2"}
    assert_sound(result, evaluate.layout)


def test_several_guides_may_lead_phase_2(evaluate: Analytic, phase1: SearchResult) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    two = in_corridor(evaluate, corridor, phase1, [evaluate.scores, evaluate.importance])
    one = in_corridor(evaluate, corridor, phase1, [evaluate.scores])
    assert not np.array_equal(two.front.masks.words, one.front.masks.words)
    assert_sound(two, evaluate.layout)


def test_without_a_guide_phase_2_is_refused(evaluate: Analytic, phase1: SearchResult) -> None:
    with pytest.raises(ValueError, match="at least one importance score as guide"):
        in_corridor(evaluate, corridor_of(phase1.front, evaluate.layout), phase1, [])


def test_an_unknown_algorithm_is_refused_before_anything_is_evaluated(evaluate: Analytic, phase1: SearchResult) -> None:
    with pytest.raises(ValueError, match="among nsga2, moead, found 'nsga3'"):
        in_corridor(evaluate, corridor_of(phase1.front, evaluate.layout), phase1, [evaluate.scores], algorithm="nsga3")
    with pytest.raises(ValueError, match="among nsga2, moead, found 'mskea'"):
        in_corridor(evaluate, corridor_of(phase1.front, evaluate.layout), phase1, [evaluate.scores], algorithm="mskea")
    with pytest.raises(ValueError, match="among nsga2, moead, sparse_ea, mskea, found 'random'"):
        flat(evaluate, evaluate.layout, algorithm="random")
    assert len(evaluate.seen) == 0


def inside(corridor: Corridor, masks: PackedMasks) -> np.ndarray:
    return (corridor.restrict(masks).words == masks.words).all(axis=1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("evaluations", [5, 60, 150])
def test_several_corridors_share_the_budget_exactly_and_are_never_left(
    algorithm: str, evaluations: int, evaluate: Analytic, phase1: SearchResult
) -> None:
    corridors = several(phase1, evaluate.layout, 3)
    assert len(corridors) == 3
    settings: dict[str, Any] = {"algorithm": algorithm, "evaluations": evaluations, "population": 24}
    result = in_corridor(evaluate, corridors, phase1, [evaluate.scores], **settings)
    assert len(evaluate.seen) == n_distinct(evaluate.seen) == evaluations
    assert result.history[-1]["evaluations"] == phase1.history[-1]["evaluations"] + evaluations
    within = np.array([inside(corridor, evaluate.seen) for corridor in corridors])
    assert within.any(axis=0).all()
    assert result.front.hypervolume() >= phase1.front.hypervolume()
    assert_sound(result, evaluate.layout)
    if evaluations == 150:
        # Each one has had at least its first population.
        assert within.sum(axis=1).min() >= 8
    again = in_corridor(Analytic(evaluate.layout), corridors, phase1, [evaluate.scores], **settings)
    assert same(result, again)
    other = in_corridor(Analytic(evaluate.layout), corridors, phase1, [evaluate.scores], **(settings | {"seed": 1}))
    assert evaluations < 60 or not same(result, other)


def test_one_corridor_in_a_list_is_that_corridor(evaluate: Analytic, phase1: SearchResult) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    assert same(
        in_corridor(evaluate, [corridor], phase1, [evaluate.scores]),
        in_corridor(Analytic(evaluate.layout), corridor, phase1, [evaluate.scores]),
    )


def test_without_a_corridor_everything_is_searched(evaluate: Analytic, phase1: SearchResult) -> None:
    result = in_corridor(evaluate, [Corridor.everything(evaluate.layout)], phase1, [evaluate.importance])
    narrow = corridor_of(phase1.front, evaluate.layout)
    assert not inside(narrow, evaluate.seen).all()
    assert_sound(result, evaluate.layout)
    with pytest.raises(ValueError, match="one importance score as guide and one corridor"):
        in_corridor(evaluate, [], phase1, [evaluate.scores])


def test_a_guide_that_depends_on_the_candidate_is_made_for_each_corridor_and_followed(
    evaluate: Analytic, phase1: SearchResult
) -> None:
    corridors, asked = several(phase1, evaluate.layout, 2), []

    def guide_of(corridor: Corridor) -> CandidateRanking:
        ranking = corridor.rank(evaluate.importance)

        def order(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
            asked.append(corridor)
            return {k: ranking[k] for k in chosen}

        return order

    result = in_corridor(evaluate, corridors, phase1, [evaluate.scores, guide_of], evaluations=120)
    assert {id(corridor) for corridor in asked} == {id(corridor) for corridor in corridors}
    assert_sound(result, evaluate.layout)
    plain = in_corridor(Analytic(evaluate.layout), corridors, phase1, [evaluate.scores], evaluations=120)
    assert not same(result, plain)


def test_a_search_that_does_not_adapt_is_another_one(evaluate: Analytic, phase1: SearchResult) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    adaptive, fixed = (
        in_corridor(Analytic(evaluate.layout), corridor, phase1, [evaluate.scores], adaptive=adaptive, evaluations=150)
        for adaptive in (True, False)
    )
    assert not same(adaptive, fixed)


class Scripted:
    """A run that adds given amounts of hypervolume, one in each of its turns, and records its turns."""

    def __init__(self, turns: list[int], recorder: Any, gains: Callable[[int], float], length: int = 1000) -> None:
        self.turns, self._recorder, self._gains, self._length, self.own = turns, recorder, gains, length, 0
        self.number = len(recorder.runs)
        recorder.runs.append(self)

    @property
    def ended(self) -> bool:
        return self.own >= self._length or self._recorder.evaluations >= self._recorder.budget

    def step(self) -> None:
        self._recorder.evaluations += 10
        self._recorder.volume += self._gains(self.own)
        self.own += 1
        self.turns.append(self.number)


class ScriptedRecorder:
    def __init__(self, budget: int) -> None:
        self.evaluations, self.budget, self.volume, self.runs = 0, budget, 0.0, []  # type: ignore[var-annotated]
        self.closed = False

    @property
    def front(self) -> Any:
        return self

    def hypervolume(self) -> float:
        return self.volume

    def close_generation(self) -> None:
        self.closed = True


def turns_of(gains: Sequence[Callable[[int], float]], n_turns: int, lengths: Sequence[int] = (1000,) * 9) -> list[int]:
    recorder, turns = ScriptedRecorder(10 * n_turns), []  # type: ignore[var-annotated]
    runs = [Scripted(turns, recorder, gain, length) for gain, length in zip(gains, lengths, strict=False)]
    take_turns(runs, recorder)  # type: ignore[arg-type]
    assert recorder.closed
    return turns


def test_turns_go_to_the_run_that_gains_most_and_no_run_waits_for_ever() -> None:
    turns = turns_of([lambda i: 0.001, lambda i: 0.01, lambda i: 0.0], 120)
    # Each run once; then the best one, except for every fourth turn.
    assert sorted(turns[:3]) == [0, 1, 2]
    counts = np.bincount(turns)
    assert counts[1] > 0.7 * 120
    assert min(counts[0], counts[2]) >= 10
    waits = [np.diff(np.flatnonzero(np.array(turns) == number)).max() for number in range(3)]
    assert max(waits) <= 3 * WAITING_TURN


def test_a_run_that_has_nothing_left_to_find_hands_its_turns_on() -> None:
    turns = turns_of([lambda i: 0.1 if i < 20 else 0.0, lambda i: 0.01], 100)
    assert np.bincount(turns[:20])[0] >= 14
    assert np.bincount(turns[-40:])[1] >= 25


def test_runs_that_have_ended_are_not_asked_again() -> None:
    turns = turns_of([lambda i: 1.0, lambda i: 0.1, lambda i: 0.0], 60, [5, 7, 1000])
    assert np.bincount(turns).tolist() == [5, 7, 48]
    assert turns_of([lambda i: 1.0, lambda i: 0.1], 60, [5, 7]).count(1) == 7
