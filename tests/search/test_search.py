"""The searches on a cheap analytic evaluator: budgets, determinism, what a front may not lose, and errors."""

import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paretoprune.files import write_csv
from paretoprune.fronts import Front, hypervolume
from paretoprune.importance.allocation import allocate, starting_allocations
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks, fingerprint, pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups
from paretoprune.search import operators, search
from paretoprune.search import sparse_ea as sparse
from paretoprune.search.corridor import Corridor, anchors_between, choose_anchors, corridors_of
from paretoprune.search.operators import AdaptiveVariation
from paretoprune.search.search import (
    HISTORY_COLUMNS,
    Evaluate,
    Recorder,
    SearchResult,
    judge_again,
    ladder_of_densities,
    read_history,
    search_corridor,
    search_flat,
    search_thresholds,
    sweep_allocation,
)

DENSITIES = (0.8, 0.4, 0.2, 0.1)
STARTS = ("uniform", "global_magnitude", "erdos_renyi_kernel")
N_STARTS = len(DENSITIES) * len(STARTS)
ALGORITHMS = ("nsga2", "moead")
SPARSE = ("sparse_ea", "mskea")


class Analytic:
    """An error that needs no network: each layer lets through the importance it keeps, and layers multiply.

    What it remembers of its calls is what the tests ask about.
    """

    def __init__(self, layout: WeightUnits) -> None:
        self.layout = layout
        rng = np.random.default_rng(42)
        self.importance = rng.exponential(size=layout.n_weights) * np.repeat([1.0, 2.0, 0.5], layout.sizes)
        # What a search is told is only roughly what matters.
        self.scores = self.importance * np.exp(0.5 * rng.standard_normal(layout.n_weights))
        self.judged = PackedMasks.empty(layout.n_weights)

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        self.judged = self.judged.concatenate(masks)
        errors = []
        for i in range(len(masks)):
            kept = self.layout.split(self.importance * masks.unpack(i)).values()
            whole = self.layout.split(self.importance).values()
            errors.append(1 - 0.95 * np.prod([(a.sum() / b.sum()) ** 0.7 for a, b in zip(kept, whole, strict=True)]))
        return np.column_stack([errors, masks.density]).reshape(-1, 2)

    def booleans(self) -> np.ndarray:
        return np.array([self.judged.unpack(i) for i in range(len(self.judged))])


@pytest.fixture
def evaluate(layout: WeightUnits) -> Analytic:
    return Analytic(layout)


def starts_of(evaluate: Analytic) -> list[np.ndarray]:
    return starting_allocations(STARTS, DENSITIES, {"magnitude": evaluate.scores}, evaluate.layout)


def thresholds(evaluate: Analytic, evaluations: int = 90, seed: int = 0, **changed: Any) -> SearchResult:
    starts = changed.pop("starts", starts_of(evaluate))
    settings = {"population": 12, "evaluations": evaluations, "seed": seed} | changed
    return search_thresholds(evaluate, evaluate.layout, evaluate.scores, starts, **settings)


def corridor_of(front: Front, layout: WeightUnits) -> Corridor:
    light, heavy = choose_anchors(front, 0.05, 1.0, light_tolerance=0.1, heavy_tolerance=0.8)
    return Corridor.between(front.masks.unpack(light), front.masks.unpack(heavy), layout)


def in_corridor(
    evaluate: Evaluate,
    corridor: Corridor | Sequence[Corridor],
    before: SearchResult,
    guides: list[np.ndarray],
    **changed: Any,
) -> SearchResult:
    settings: dict[str, Any] = {
        "algorithm": "nsga2",
        "evaluations": 90,
        "population": 12,
        "softness": 0.05,
        "first_rate": 0.05,
        "crossover_probability": 0.5,
        "seed": 0,
    }
    return search_corridor(evaluate, corridor, guides, before, **(settings | changed))


def both_phases(layout: WeightUnits, algorithm: str, seed: int = 0) -> SearchResult:
    evaluate = Analytic(layout)
    before = thresholds(evaluate, seed=seed)
    corridor = corridor_of(before.front, layout)
    return in_corridor(evaluate, corridor, before, [evaluate.scores], algorithm=algorithm, seed=seed)


def flat(evaluate: Evaluate, layout: WeightUnits, **changed: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "algorithm": "nsga2",
        "evaluations": 90,
        "population": 12,
        "flip_rate": 0.01,
        "seed": 0,
    }
    return search_flat(evaluate, layout, **(settings | changed))


def allocation_sweep(evaluate: Analytic) -> SearchResult:
    counts = [allocate("global", evaluate.scores, evaluate.layout, density) for density in DENSITIES]
    return sweep_allocation(evaluate, evaluate.layout, evaluate.scores, counts)


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
    """What holds after every search: the front is what the evaluator says of its masks, the history only rises."""
    front, history = result.front, result.history
    columns = {name: np.array([row[name] for row in history]) for name in HISTORY_COLUMNS}
    np.testing.assert_array_equal(front.objectives, Analytic(layout)(front.masks))
    assert len(Front.empty(layout.n_weights).merge(front)) == len(front)
    assert np.all(np.diff(front.density) > 0)
    assert [tuple(row) for row in history] == [HISTORY_COLUMNS] * len(history)
    assert columns["generation"].tolist() == list(range(1, len(history) + 1))
    assert np.all(np.diff(columns["evaluations"]) > 0)
    assert np.all(np.diff(columns["seconds"]) >= 0)
    assert np.all(np.diff(columns["hypervolume"]) >= 0)
    assert history[-1]["hypervolume"] == front.hypervolume()


# What holds for all of them


@each_search
def test_the_same_seed_gives_the_same_front_and_history(name: str, layout: WeightUnits) -> None:
    first, again = SEARCHES[name](layout, 3), SEARCHES[name](layout, 3)
    assert same(first, again)


@each_search
def test_another_seed_gives_another_front(name: str, layout: WeightUnits) -> None:
    first, other = SEARCHES[name](layout, 3), SEARCHES[name](layout, 4)
    assert not np.array_equal(first.front.masks.words, other.front.masks.words)
    assert without_seconds(first) != without_seconds(other)


@each_search
def test_fronts_and_histories_are_sound(name: str, layout: WeightUnits) -> None:
    assert_sound(SEARCHES[name](layout, 0), layout)


@each_search
def test_no_search_draws_from_the_global_random_state(name: str, layout: WeightUnits) -> None:
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    SEARCHES[name](layout, 0)
    np.testing.assert_equal(np.random.get_state(legacy=False), before)  # noqa: NPY002


# Phase 1


@pytest.mark.parametrize("evaluations", [24, 30, 37, 90])
def test_phase_1_spends_its_budget_exactly_and_judges_each_mask_once(evaluations: int, evaluate: Analytic) -> None:
    result = thresholds(evaluate, evaluations)
    assert n_distinct(evaluate.judged) == len(evaluate.judged)
    assert len(evaluate.judged) == result.history[-1]["evaluations"] == evaluations


def test_phase_1_never_exceeds_its_budget_where_many_thresholds_give_the_same_mask() -> None:
    tiny = WeightUnits(("a", "b", "c"), ((3,), (2,), (2,)))
    evaluate = Analytic(tiny)
    # There are 4 * 3 * 3 masks that thresholds can spell.
    result = thresholds(evaluate, 60, starts=[])
    assert n_distinct(evaluate.judged) == len(evaluate.judged) <= 36
    assert result.history[-1]["evaluations"] == len(evaluate.judged)


def test_no_starting_allocation_dominates_the_front_of_phase_1(evaluate: Analytic) -> None:
    starts, ranks = starts_of(evaluate), ranks_within_groups(evaluate.scores, evaluate.layout)
    result = thresholds(evaluate)
    masks = np.array([keep_top(ranks, counts, evaluate.layout) for counts in starts])
    judged = Analytic(evaluate.layout)(PackedMasks.pack(masks))
    np.testing.assert_array_equal(evaluate.booleans()[:N_STARTS], masks)
    for start in judged:
        assert any(np.all(member <= start) for member in result.front.objectives)
        assert not any(np.all(start <= member) and np.any(start < member) for member in result.front.objectives)
    assert result.front.hypervolume() > hypervolume(judged)
    assert result.history[0]["hypervolume"] == pytest.approx(hypervolume(judged), abs=1e-12)


def test_phase_1_says_which_members_were_there_from_the_start(evaluate: Analytic) -> None:
    result = thresholds(evaluate)
    assert set(result.front.stages) == {"start", "phase1"}
    assert [row["stage"] for row in result.history] == ["start"] + ["phase1"] * (len(result.history) - 1)
    assert result.history[0]["evaluations"] == N_STARTS


def test_masks_of_phase_1_keep_the_best_ranked_of_each_layer(evaluate: Analytic) -> None:
    thresholds(evaluate)
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    for mask, counts in zip(evaluate.booleans(), evaluate.layout.n_kept(evaluate.judged), strict=True):
        np.testing.assert_array_equal(mask, keep_top(ranks, counts, evaluate.layout))


def test_phase_1_works_without_starts(evaluate: Analytic) -> None:
    result = thresholds(evaluate, starts=[])
    assert set(result.front.stages) == {"phase1"}
    assert_sound(result, evaluate.layout)


def test_a_budget_that_does_not_pay_for_the_first_population_is_refused(evaluate: Analytic) -> None:
    with pytest.raises(ValueError, match=r"needs at least 24 evaluations \(12 starting .* 12\), found 23; raise"):
        thresholds(evaluate, 23)
    assert len(evaluate.judged) == 0


# Phase 2


@pytest.fixture(scope="module")
def phase1(layout: WeightUnits) -> SearchResult:
    return thresholds(Analytic(layout))


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
def test_phase_2_spends_its_budget_exactly_and_judges_each_mask_once(
    algorithm: str, evaluations: int, evaluate: Analytic, phase1: SearchResult
) -> None:
    corridor = corridor_of(phase1.front, evaluate.layout)
    settings = {"algorithm": algorithm, "evaluations": evaluations}
    result = in_corridor(evaluate, corridor, phase1, [evaluate.scores], **settings)
    assert n_distinct(evaluate.judged) == len(evaluate.judged)
    assert not set(evaluate.judged.fingerprints()) & set(phase1.front.masks.fingerprints())
    assert result.history[-1]["evaluations"] == phase1.history[-1]["evaluations"] + len(evaluate.judged)
    assert len(evaluate.judged) == evaluations


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_corridor_of_a_few_bits_is_searched_until_it_runs_dry(algorithm: str, evaluate: Analytic) -> None:
    heavy = np.arange(evaluate.layout.n_weights) % 3 == 0
    light = heavy.copy()
    light[[1, 200, 350]] = True
    masks = PackedMasks.pack(np.array([heavy, light]))
    before = SearchResult(Front(masks, evaluate(masks), ["phase1"] * 2), [])
    evaluate.judged = PackedMasks.empty(evaluate.layout.n_weights)
    corridor = Corridor.between(light, heavy, evaluate.layout)
    in_corridor(evaluate, corridor, before, [evaluate.scores], algorithm=algorithm, evaluations=500)
    assert n_distinct(evaluate.judged) == len(evaluate.judged) <= 2**3 - 2


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


def test_an_unknown_algorithm_is_refused_before_anything_is_judged(evaluate: Analytic, phase1: SearchResult) -> None:
    with pytest.raises(ValueError, match="among nsga2, moead, found 'nsga3'"):
        in_corridor(evaluate, corridor_of(phase1.front, evaluate.layout), phase1, [evaluate.scores], algorithm="nsga3")
    with pytest.raises(ValueError, match="among nsga2, moead, found 'mskea'"):
        in_corridor(evaluate, corridor_of(phase1.front, evaluate.layout), phase1, [evaluate.scores], algorithm="mskea")
    with pytest.raises(ValueError, match="among nsga2, moead, sparse_ea, mskea, found 'random'"):
        flat(evaluate, evaluate.layout, algorithm="random")
    assert len(evaluate.judged) == 0


# The baselines


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *SPARSE])
@pytest.mark.parametrize("evaluations", [14, 41, 90])
def test_the_flat_search_spends_its_budget_exactly(algorithm: str, evaluations: int, evaluate: Analytic) -> None:
    result = flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=evaluations)
    assert n_distinct(evaluate.judged) == len(evaluate.judged)
    assert len(evaluate.judged) == result.history[-1]["evaluations"] == evaluations
    assert set(result.front.stages) == {"flat"}


@pytest.mark.parametrize("algorithm", SPARSE)
def test_scores_and_the_first_population_are_paid_for(algorithm: str, evaluate: Analytic) -> None:
    result = flat(evaluate, evaluate.layout, algorithm=algorithm, score_share=0.11)
    masks = evaluate.booleans()
    # A tenth of 90, and what it says of groups is the first that is asked.
    np.testing.assert_array_equal((~masks[:9]).sum(axis=0), np.ones(evaluate.layout.n_weights))
    assert [row["evaluations"] for row in result.history[:2]] == [9, 21]
    assert 0 < masks[9:21].mean(axis=1).min() < 0.4 < 0.9 < masks[9:21].mean(axis=1).max() < 1


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_sparse_search_goes_on_from_the_best_it_has_judged(
    algorithm: str, evaluate: Analytic, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[Genome]] = []
    make = search._packed_nsga2

    def watched(population: int, first: list[Genome], *args: Any, **kwargs: Any) -> Any:
        given.append(list(first))
        return make(population, first, *args, **kwargs)

    monkeypatch.setattr(search, "_packed_nsga2", watched)
    flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=90, score_share=0.2)
    judged = evaluate.judged.select(np.arange(18 + 12))
    ((first),) = given
    assert len(first) == 12
    taken = {genome.fingerprint for genome in first}
    objectives = Analytic(evaluate.layout)(judged)
    by_rank = [set(judged.select(rank).fingerprints()) for rank in search.NonDominatedSorting().do(objectives)]
    # Whole ranks as long as they fit, then some of the next one.
    while by_rank and len(by_rank[0]) <= len(taken):
        assert by_rank[0] <= taken
        taken -= by_rank.pop(0)
    assert taken <= by_rank[0]


def test_mskea_learns_from_the_non_dominated_of_each_generation(
    evaluate: Analytic, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    learn = sparse.StagedVariation.learn

    def watched(self: Any, front: list[Genome], spent: float, rng: np.random.Generator) -> None:
        masks = PackedMasks.of_genomes(front, evaluate.layout.n_weights)
        assert len(Front.empty(masks.n_units).merge(Front(masks, judge(masks), ["x"] * len(masks)))) == len(masks) > 0
        told.append(spent)
        learn(self, front, spent, rng)

    judge = Analytic(evaluate.layout)
    monkeypatch.setattr(sparse.StagedVariation, "learn", watched)
    result = flat(evaluate, evaluate.layout, algorithm="mskea", evaluations=150, score_share=0.1)
    # Before every generation that spends anything, after the scores and the first population.
    spent = [row["evaluations"] / 150 for row in result.history[1:-1]]
    assert [share for share in dict.fromkeys(told) if share < 1] == spent


@pytest.mark.parametrize("algorithm", SPARSE)
def test_what_scores_tell_is_worth_what_they_cost(algorithm: str) -> None:
    layout = WeightUnits(("a", "b"), ((40, 50), (40, 50)))
    useful = np.repeat(np.arange(80) % 20 < 5, 50)

    def evaluate(masks: PackedMasks) -> np.ndarray:
        kept = np.array([masks.unpack(i)[useful].mean() for i in range(len(masks))])
        return np.column_stack([1 - kept**2, masks.density])

    settings: dict[str, Any] = {"evaluations": 400, "seed": 1}
    blind = flat(evaluate, layout, algorithm="nsga2", **settings).front.hypervolume()
    scored = flat(evaluate, layout, algorithm=algorithm, score_share=0.1, **settings).front.hypervolume()
    unscored = flat(evaluate, layout, algorithm=algorithm, score_share=0.001, **settings).front.hypervolume()
    assert scored > blind + 0.05
    assert scored > unscored + 0.05


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_budget_without_a_population_beside_the_scores_is_refused(algorithm: str, evaluate: Analytic) -> None:
    expected = rf"{algorithm} needs at least 14 evaluations \(2 groups .* population of 12\), found 13; raise"
    with pytest.raises(ValueError, match=expected):
        flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=13)
    with pytest.raises(ValueError, match="needs at least 84 evaluations"):
        flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=80, score_share=0.9)
    assert len(evaluate.judged) == 0


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_sparse_search_runs_dry_where_there_are_few_masks(algorithm: str) -> None:
    tiny = WeightUnits(("a", "b", "c"), ((3,), (2,), (2,)))
    evaluate = Analytic(tiny)
    flat(evaluate, tiny, algorithm=algorithm, evaluations=500, score_share=0.01)
    assert n_distinct(evaluate.judged) == len(evaluate.judged) <= 2**7 - 1
    assert evaluate.judged.n_kept.min() >= 1


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_sparse_search_holds_its_population_as_bits(algorithm: str) -> None:
    n, population = 200_000, 200
    layout = WeightUnits(("a", "b"), ((100, n // 200), (100, n // 200)))
    masks = population * n / 8

    def judge(masks: PackedMasks) -> np.ndarray:
        words = np.bitwise_count(masks.words[:, ::100]).sum(axis=1)
        return np.column_stack([1 - words / words.max(), masks.density])

    tracemalloc.start()
    try:
        settings: dict[str, Any] = {"evaluations": 1000, "population": population, "score_share": 0.01}
        flat(judge, layout, algorithm=algorithm, **settings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Parents, children, their masks as the evaluator is given them, and the front; beside them a few numbers per weight
    # for knowledge and the child at hand. One byte a weight of every mask would be 8 masks more.
    assert peak < 5 * masks + 80 * n


def test_the_allocation_sweep_judges_each_rung_once(evaluate: Analytic) -> None:
    result = allocation_sweep(evaluate)
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    expected = [
        keep_top(ranks, allocate("global", evaluate.scores, evaluate.layout, density), evaluate.layout)
        for density in DENSITIES
    ]
    np.testing.assert_array_equal(evaluate.booleans(), np.array(expected))
    assert [row["evaluations"] for row in result.history] == [1, 2, 3, 4]
    assert set(result.front.stages) == {"allocation"}
    assert_sound(result, evaluate.layout)
    assert same(result, allocation_sweep(Analytic(evaluate.layout)))


def test_rungs_that_round_to_the_same_counts_are_judged_once(evaluate: Analytic) -> None:
    counts = allocate("uniform", evaluate.scores, evaluate.layout, 0.5)
    result = sweep_allocation(evaluate, evaluate.layout, evaluate.scores, [counts, counts])
    assert len(evaluate.judged) == len(result.front) == len(result.history) == 1


# pymoo and packed genomes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pymoo_hands_genomes_on_as_they_are(
    algorithm: str, evaluate: Analytic, phase1: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Genome] = []
    stack = PackedMasks.of_genomes

    def watched(genomes: Iterable[Genome], n_weights: int) -> PackedMasks:
        listed = list(genomes)
        seen.extend(listed)
        return stack(listed, n_weights)

    monkeypatch.setattr(PackedMasks, "of_genomes", watched)
    corridor = corridor_of(phase1.front, evaluate.layout)
    in_corridor(evaluate, corridor, phase1, [evaluate.scores], algorithm=algorithm)
    for flat_algorithm in (algorithm, *SPARSE):
        flat(evaluate, evaluate.layout, algorithm=flat_algorithm)
    assert len(seen) > 100
    for genome in seen:
        assert type(genome) is Genome
        assert genome.words.dtype == np.uint64
        # Neither a draft, nor changed after others have learnt its fingerprint, nor a part of something larger.
        assert not genome.words.flags.writeable
        assert genome.fingerprint == fingerprint(genome.words)
        assert genome.words.base is None


def genomes_of(words: np.ndarray) -> np.ndarray:
    return search._individuals([Genome(row) for row in words])


def words_of(population: Any) -> np.ndarray:
    return np.array([genome.words for (genome,) in population.get("X")])


def test_equal_genomes_are_eliminated() -> None:
    words = pack_rows(np.random.default_rng(0).random((4, 130)) < 0.5)
    # They differ in the lowest bit only, which a distance of floats would not see.
    near = words[:1] ^ np.array([1, 0, 0], dtype=np.uint64)
    elimination = search._PackedDuplicates()
    candidates = search.Population.new("X", genomes_of(np.concatenate([words[:2], words[:1], near])))
    np.testing.assert_array_equal(words_of(elimination.do(candidates)), np.concatenate([words[:2], near]))
    against = elimination.do(candidates, search.Population.new("X", genomes_of(words[1:3])))
    np.testing.assert_array_equal(words_of(against), np.concatenate([words[:1], near]))
    assert len(elimination.do(candidates, candidates)) == 0


def test_nsga2_starts_with_genomes_that_differ_in_one_bit_only(layout: WeightUnits) -> None:
    first = pack_rows(np.random.default_rng(0).random((4, layout.n_weights)) < 0.5)
    first[1], first[2] = first[0], first[0]
    first[2, 0] ^= np.uint64(1)
    recorder = Recorder(Analytic(layout), layout.n_weights, budget=10, stage="flat")
    given = [Genome(row) for row in first]
    algorithm = search._packed_algorithm("nsga2", 4, given, lambda a, b, rng: a.copy(), lambda g, rng: g, 0.5)
    algorithm.setup(search.PruningProblem.packed(layout.n_weights, recorder), seed=0)
    np.testing.assert_array_equal(words_of(algorithm.ask()), first[[0, 2, 3]])
    # Whoever dies out must not be held by the list it came from.
    assert not given


def test_crossover_crosses_as_often_as_it_should_and_passes_either_parent_on_otherwise() -> None:
    zero, one = Genome(np.zeros(3, dtype=np.uint64)), Genome(np.ones(3, dtype=np.uint64))
    crossover = search._PackedCrossover(lambda first, second, rng: first | (second << np.uint64(1)), 0.3)
    pairs = np.array([zero, one], dtype=object)[:, None, None].repeat(1000, axis=1)
    (children,) = crossover._do(None, pairs, random_state=np.random.default_rng(0))
    n_crossed = sum(child not in (zero, one) for (child,) in children)
    assert n_crossed == pytest.approx(300, abs=45)
    for parent in (zero, one):
        assert sum(child is parent for (child,) in children) == pytest.approx(350, abs=45)


def guided(layout: WeightUnits, corridor: Corridor, algorithm: str, population: int) -> tuple[Any, AdaptiveVariation]:
    guides = [np.random.default_rng(i).random(layout.n_weights) for i in range(2)]
    return search.guided_algorithm(
        algorithm,
        corridor,
        [corridor.rank(scores) for scores in guides],
        PackedMasks.empty(layout.n_weights),
        population=population,
        softness=0.05,
        first_rate=0.02,
        crossover_probability=0.5,
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_children_share_their_layers_up_to_some_boundary_with_a_parent(algorithm: str) -> None:
    layout = WeightUnits(tuple("abcdef"), ((100,),) * 6)
    chosen, variation = guided(
        layout, Corridor.between(np.ones(600, dtype=bool), np.zeros(600, dtype=bool), layout), algorithm, 20
    )
    problem = search.PruningProblem.packed(
        600, lambda m: (np.column_stack([1 - m.density**2, m.density]), m.density > 2), variation.reward
    )
    chosen.setup(problem, termination=search.NoTermination(), seed=0)
    n_shared: list[int] = []
    for generation in range(6):
        parents = np.array([unpack_row(row, 600) for row in words_of(chosen.pop)]) if generation else None
        children = chosen.ask()
        if parents is not None:
            for row in words_of(children):
                differs = (parents != unpack_row(row, 600)).reshape(-1, 6, 100).any(axis=2)
                n_shared.append(int(np.where(differs.any(axis=1), differs.argmax(axis=1), 6).max()))
        chosen.evaluator.eval(problem, children)
        chosen.tell(infills=children)
    # The first touched layer is one of six, so that on average at least some layers before it are a parent's.
    assert np.mean(n_shared) > 1.5
    assert np.mean(np.array(n_shared) >= 4) > 0.1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_large_population_takes_little_more_memory_than_its_bits(algorithm: str) -> None:
    n, population = 1_000_000, 100
    layout = WeightUnits(tuple(map(str, range(40))), ((n // 40,),) * 40)
    scores = np.random.default_rng(5).random(n)
    corridor = Corridor.between(scores > 0.25, scores > 0.75, layout)
    masks = population * n / 8
    rankings = 2 * 4 * corridor.n_searched

    tracemalloc.start()
    try:
        chosen, variation = guided(layout, corridor, algorithm, population)

        def judge(masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
            words = np.bitwise_count(masks.words[:, ::1000]).sum(axis=1)
            return np.column_stack([1 - words / words.max(), masks.density]), words % 2 == 0

        problem = search.PruningProblem.packed(n, judge, variation.reward)
        chosen.setup(problem, termination=search.NoTermination(), seed=0)
        tracemalloc.reset_peak()
        for _ in range(5):
            children = chosen.ask()
            chosen.evaluator.eval(problem, children)
            chosen.tell(infills=children)
            # pymoo remembers its last offspring, most of which are dead by now.
            children = chosen.off = None
        retained, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Parents, children, and the children's masks as the evaluator is given them; one float a weight would be 8 more.
    assert peak < 3.2 * masks + rankings
    # Survivors of five generations hold on to nobody who died out.
    assert retained < 1.15 * masks + rankings


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_phase_2_tells_its_variation_what_became_of_each_genome(
    algorithm: str, layout: WeightUnits, phase1: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(AdaptiveVariation, "reward", lambda self, genome, success: told.append(success))
    evaluate = Analytic(layout)
    in_corridor(
        evaluate, corridor_of(phase1.front, layout), phase1, [evaluate.importance], algorithm=algorithm, evaluations=60
    )
    # All but a last generation that the budget cuts short.
    assert len(told) >= 48
    assert 0 < sum(told) < len(told)


# The recorder


def test_the_recorder_answers_from_memory_and_in_order(evaluate: Analytic) -> None:
    rng = np.random.default_rng(0)
    masks = PackedMasks.pack(rng.random((4, evaluate.layout.n_weights)) < [[0.2], [0.4], [0.6], [0.8]])
    recorder = Recorder(evaluate, evaluate.layout.n_weights, budget=10, stage="flat")
    first, _ = recorder(masks.select([1, 0, 1]))
    second, _ = recorder(masks.select([3, 1, 2]))
    expected = Analytic(evaluate.layout)(masks)
    np.testing.assert_array_equal(first, expected[[1, 0, 1]])
    np.testing.assert_array_equal(second, expected[[3, 1, 2]])
    assert sorted(evaluate.judged.fingerprints()) == sorted(masks.fingerprints())
    assert (recorder.evaluations, recorder.remaining) == (4, 6)


def test_the_recorder_judges_as_many_masks_as_the_budget_pays_for(evaluate: Analytic) -> None:
    n = evaluate.layout.n_weights
    masks = PackedMasks.pack(np.arange(n) < np.arange(1, 6)[:, None])
    recorder = Recorder(evaluate, n, budget=3, stage="flat")
    recorder(masks.select([0, 1]))
    with pytest.raises(search._BudgetSpentError):
        recorder(masks)
    recorder.close_generation()
    assert len(evaluate.judged) == recorder.evaluations == recorder.result().history[-1]["evaluations"] == 3
    assert recorder(masks.select([1, 0]))[0].shape == (2, 2)


def test_the_recorder_tells_which_masks_newly_joined_the_front() -> None:
    objectives = {1: (0.5, 0.1), 2: (0.6, 0.2), 3: (0.1, 0.3)}
    masks = PackedMasks.pack(np.arange(70) < np.array([[1], [2], [3]]))
    recorder = Recorder(lambda m: np.array([objectives[n] for n in m.n_kept]), 70, budget=9, stage="flat")
    assert recorder(masks)[1].tolist() == [True, False, True]
    assert recorder(masks)[1].tolist() == [False, False, False]


def test_a_generation_without_a_new_mask_adds_no_row(evaluate: Analytic) -> None:
    told: list[dict[str, Any]] = []
    n = evaluate.layout.n_weights
    recorder = Recorder(evaluate, n, budget=10, stage="flat", progress=told.append)
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
        (lambda n: np.full((n, 2), np.nan), r"shape \(3, 2\) with 6 values that are not finite"),
        (lambda n: np.column_stack([[0.5, np.inf, 0.1], [1] * n]), r"shape \(3, 2\) with 1 values that are not finite"),
        (lambda n: np.zeros((n, 3)), r"shape \(3, 3\)"),
        (lambda n: np.zeros((n - 1, 2)), r"shape \(2, 2\)"),
    ],
)
def test_objectives_that_are_not_finite_or_not_two_are_refused(
    answer: Callable[[int], np.ndarray], found: str, layout: WeightUnits
) -> None:
    masks = PackedMasks.pack(np.arange(layout.n_weights) < np.array([[1], [2], [3]]))
    recorder = Recorder(lambda m: answer(len(m)), layout.n_weights, budget=9, stage="flat")
    with pytest.raises(ValueError, match=rf"expected finite objectives of shape \(3, 2\) .* found {found}"):
        recorder(masks)
    assert len(recorder.front) == recorder.evaluations == 0


def test_a_search_stops_at_objectives_that_are_not_finite(layout: WeightUnits) -> None:
    def broken(masks: PackedMasks) -> np.ndarray:
        return np.column_stack([np.where(masks.density < 0.5, np.nan, 0.1), masks.density])

    with pytest.raises(ValueError, match="values that are not finite"):
        flat(broken, layout)


# Phase 1 on a ladder


def starting_masks(evaluate: Analytic) -> np.ndarray:
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    return np.array([keep_top(ranks, counts, evaluate.layout) for counts in starts_of(evaluate)])


@pytest.mark.parametrize("level_switches", [0.0, 0.5, 1.0])
def test_on_a_ladder_starts_are_judged_as_they_are_and_candidates_use_rungs_only(
    level_switches: float, evaluate: Analytic
) -> None:
    result = thresholds(evaluate, rungs=7, level_switches=level_switches)
    masks, layout = evaluate.booleans(), evaluate.layout
    np.testing.assert_array_equal(masks[:N_STARTS], starting_masks(evaluate))
    rungs = np.rint(ladder_of_densities(7) * layout.sizes[:, None]).astype(int)
    counts = layout.n_kept(evaluate.judged)[N_STARTS:]
    assert len(counts) > 0
    for layer in range(layout.n_groups):
        assert set(counts[:, layer]) <= set(rungs[layer])
        assert len(set(counts[:, layer])) > 2
    # Without a ladder that is not so.
    free = Analytic(layout)
    thresholds(free)
    assert not set(layout.n_kept(free.judged)[N_STARTS:, 1]) <= set(rungs[1])
    assert result.history[-1]["evaluations"] == len(evaluate.judged) == n_distinct(evaluate.judged) == 90
    assert_sound(result, layout)


def test_what_a_ladder_needs_is_told_before_anything_is_judged(evaluate: Analytic) -> None:
    told: list[PackedMasks] = []

    def precompute(masks: PackedMasks) -> None:
        assert len(evaluate.judged) == 0
        told.append(masks)

    thresholds(evaluate, rungs=5, precompute=precompute)
    (masks,) = told
    expected = np.rint(ladder_of_densities(5)[:, None] * evaluate.layout.sizes)
    np.testing.assert_array_equal(evaluate.layout.n_kept(masks), expected)
    ranks = ranks_within_groups(evaluate.scores, evaluate.layout)
    np.testing.assert_array_equal(masks.unpack(2), keep_top(ranks, expected[2].astype(int), evaluate.layout))
    thresholds(Analytic(evaluate.layout), precompute=lambda masks: told.append(masks))
    assert len(told) == 1


def test_a_ladder_reaches_from_the_sparsest_rung_to_the_dense_layer() -> None:
    ladder = ladder_of_densities(24)
    assert len(ladder) == 24
    assert (ladder[0], ladder[-1]) == (pytest.approx(0.005), 1.0)
    np.testing.assert_allclose(np.diff(np.log(ladder)), np.log(200) / 23)


def test_level_switches_vary_the_share_asked_for_and_keep_the_total() -> None:
    sizes, rungs = np.array([1000, 5000, 3000, 800]), ladder_of_densities(9)
    problem = search.PruningProblem(
        4, lambda x: PackedMasks.empty(1), lambda m: (np.zeros((0, 2)), np.zeros(0)), bounds=(0, 1)
    )
    levels = np.random.default_rng(0).integers(1, 8, (2000, 4))
    x = 1.0 - rungs[levels]
    unchanged = search._LevelSwitches(rungs, sizes, 0.0, search.PM(prob_var=0.0))
    np.testing.assert_array_equal(unchanged._do(problem, x, random_state=np.random.default_rng(0)), x)
    for share in (0.3, 1.0):
        mutation = search._LevelSwitches(rungs, sizes, share, search.PM(prob_var=0.0))
        before = x.copy()
        found = mutation._do(problem, x, random_state=np.random.default_rng(1))
        np.testing.assert_array_equal(x, before)
        changed = (found != x).any(axis=1)
        assert changed.mean() == pytest.approx(share, abs=0.04)
        after = operators.nearest_rungs(1.0 - found, rungs)
        np.testing.assert_allclose(found, 1.0 - rungs[after], atol=1e-12)
        assert np.abs(after - levels).max() == 1
        counts = np.rint(rungs * sizes[:, None]).astype(int)
        totals = [counts[np.arange(4), rows].sum(axis=1) for rows in (levels, after)]
        steps = np.abs(counts[np.arange(4), after] - counts[np.arange(4), levels]).max(axis=1)
        assert np.all(np.abs(totals[1] - totals[0]) <= steps)


@pytest.mark.parametrize("rungs", [None, 7])
@pytest.mark.parametrize("n_reselected", [0, 1, 5])
def test_members_chosen_anew_are_judged_within_the_budget(
    n_reselected: int, rungs: int | None, evaluate: Analytic
) -> None:
    given: list[PackedMasks] = []

    def better(masks: PackedMasks) -> PackedMasks:
        """As many of each layer, by what truly matters."""
        given.append(masks)
        ranks = ranks_within_groups(evaluate.importance, evaluate.layout)
        rows = [keep_top(ranks, counts, evaluate.layout) for counts in evaluate.layout.n_kept(masks)]
        return PackedMasks.pack_each(rows, masks.n_units)

    result = thresholds(evaluate, 60, rungs=rungs, n_reselected=n_reselected, reselect=better)
    assert len(evaluate.judged) == n_distinct(evaluate.judged) == result.history[-1]["evaluations"] == 60
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
    assert len(evaluate.judged) == result.history[-1]["evaluations"] == 55
    # Nothing to choose them anew with: the budget is the search's.
    assert len(Analytic(evaluate.layout).judged) == 0
    other = Analytic(evaluate.layout)
    thresholds(other, 60, n_reselected=5)
    assert len(other.judged) == 60


def test_the_budget_must_pay_for_members_chosen_anew_too(evaluate: Analytic) -> None:
    with pytest.raises(ValueError, match=r"at least 27 evaluations .* a population of 12 and 3 members chosen anew\)"):
        thresholds(evaluate, 26, n_reselected=3, reselect=lambda masks: masks)
    assert len(evaluate.judged) == 0


# Several corridors


def several(phase1: SearchResult, layout: WeightUnits, n_corridors: int) -> list[Corridor]:
    light, heavy = choose_anchors(phase1.front, 0.05, 1.0, light_tolerance=0.1, heavy_tolerance=0.8)
    anchors = anchors_between(phase1.front, light, heavy, n_corridors)
    return corridors_of(phase1.front.masks.select(anchors), n_corridors, layout)


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
    assert len(evaluate.judged) == n_distinct(evaluate.judged) == evaluations
    assert result.history[-1]["evaluations"] == phase1.history[-1]["evaluations"] + evaluations
    within = np.array([inside(corridor, evaluate.judged) for corridor in corridors])
    assert within.any(axis=0).all()
    assert result.front.hypervolume() >= phase1.front.hypervolume()
    assert_sound(result, evaluate.layout)
    if evaluations == 150:
        # Each has had its first population at least.
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
    assert not inside(narrow, evaluate.judged).all()
    assert_sound(result, evaluate.layout)
    with pytest.raises(ValueError, match="one importance score as guide and one corridor"):
        in_corridor(evaluate, [], phase1, [evaluate.scores])


def test_a_moving_guide_is_made_for_each_corridor_and_followed(evaluate: Analytic, phase1: SearchResult) -> None:
    corridors, asked = several(phase1, evaluate.layout, 2), []

    def guide_of(corridor: Corridor) -> operators.MovingRanking:
        ranking = corridor.rank(evaluate.importance)

        def order(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
            asked.append(corridor)
            return {k: ranking[k] for k in chosen}

        return order

    result = in_corridor(evaluate, corridors, phase1, [evaluate.scores], moving_guide=guide_of, evaluations=120)
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
    """A run that adds so much hypervolume in each of its turns, and notes when it had them."""

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
    search._run_by_gain(runs, recorder)  # type: ignore[arg-type]
    assert recorder.closed
    return turns


def test_turns_go_to_the_run_that_gains_most_and_nobody_waits_for_ever() -> None:
    turns = turns_of([lambda i: 0.001, lambda i: 0.01, lambda i: 0.0], 120)
    # Everyone once; then the best, but for every fourth turn.
    assert sorted(turns[:3]) == [0, 1, 2]
    counts = np.bincount(turns)
    assert counts[1] > 0.7 * 120
    assert min(counts[0], counts[2]) >= 10
    waits = [np.diff(np.flatnonzero(np.array(turns) == number)).max() for number in range(3)]
    assert max(waits) <= 3 * search.WAITING_TURN


def test_a_run_that_has_nothing_left_to_find_hands_its_turns_on() -> None:
    turns = turns_of([lambda i: 0.1 if i < 20 else 0.0, lambda i: 0.01], 100)
    assert np.bincount(turns[:20])[0] >= 14
    assert np.bincount(turns[-40:])[1] >= 25


def test_runs_that_have_ended_are_not_asked_again() -> None:
    turns = turns_of([lambda i: 1.0, lambda i: 0.1, lambda i: 0.0], 60, [5, 7, 1000])
    assert np.bincount(turns).tolist() == [5, 7, 48]
    assert turns_of([lambda i: 1.0, lambda i: 0.1], 60, [5, 7]).count(1) == 7


# Which masks may be published


def even(masks: PackedMasks) -> np.ndarray:
    return masks.n_kept % 2 == 0


@pytest.mark.parametrize("name", ["thresholds", "ladder", "corridor", "corridors", "moead", "flat", "allocation"])
def test_masks_that_are_not_allowed_are_neither_judged_nor_published(name: str, layout: WeightUnits) -> None:
    evaluate = Analytic(layout)
    before = thresholds(evaluate, allowed=even)
    corridor = corridor_of(before.front, layout)
    searches: dict[str, Callable[[], SearchResult]] = {
        "thresholds": lambda: before,
        "ladder": lambda: thresholds(evaluate, allowed=even, rungs=9, level_switches=0.5),
        "corridor": lambda: in_corridor(evaluate, corridor, before, [evaluate.scores], allowed=even),
        "corridors": lambda: in_corridor(
            evaluate, several(before, layout, 2), before, [evaluate.scores], allowed=even, evaluations=60
        ),
        "moead": lambda: in_corridor(evaluate, corridor, before, [evaluate.scores], allowed=even, algorithm="moead"),
        "flat": lambda: flat(evaluate, layout, allowed=even),
        "allocation": lambda: sweep_allocation(evaluate, layout, evaluate.scores, starts_of(evaluate), allowed=even),
    }
    result = searches[name]()
    assert len(result.front) > 0
    assert even(evaluate.judged).all()
    assert even(result.front.masks).all()


def test_a_mask_that_is_not_allowed_counts_as_wrong_on_every_image() -> None:
    masks = PackedMasks.pack(np.arange(70) < np.array([[3], [4], [5]]))
    judged: list[int] = []

    def evaluate(masks: PackedMasks) -> np.ndarray:
        judged.extend(masks.n_kept.tolist())
        return np.column_stack([np.full(len(masks), 0.25), masks.density])

    recorder = Recorder(evaluate, 70, budget=9, stage="flat", allowed=even)
    objectives, joined = recorder(masks)
    assert judged == [4]
    assert objectives.tolist() == [[1.0, 3 / 70], [0.25, 4 / 70], [1.0, 5 / 70]]
    assert joined.tolist() == [False, True, False]
    assert recorder.evaluations == 3
    assert recorder.front.masks.n_kept.tolist() == [4]
    again, joined = recorder(masks)
    np.testing.assert_array_equal(again, objectives)
    assert not joined.any()
    assert (judged, recorder.evaluations) == ([4], 3)
    nothing = Recorder(evaluate, 70, budget=9, stage="flat", allowed=lambda masks: np.zeros(len(masks), dtype=bool))
    nothing(masks)
    assert len(nothing.front) == 0
    assert judged == [4]


# Files and what is published


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


def test_the_published_front_is_judged_again_and_keeps_only_the_non_dominated() -> None:
    masks = PackedMasks.pack(np.arange(70) < np.array([[7], [14], [35]]))
    rough = Front(masks, np.array([[0.6, 0.1], [0.5, 0.2], [0.1, 0.5]]), ["start", "phase1", "phase2"])
    # In full precision the second member is worse than the first.
    published = judge_again(rough, lambda m: np.column_stack([np.array([0.55, 0.58, 0.2]), m.density]))
    assert published.objectives.tolist() == [[0.55, 0.1], [0.2, 0.5]]
    assert published.stages == ["start", "phase2"]
    np.testing.assert_array_equal(published.masks.n_kept, [7, 35])


def test_the_published_front_is_thinned_to_what_keeps_most_hypervolume(
    layout: WeightUnits, phase1: SearchResult
) -> None:
    judged = judge_again(phase1.front, Analytic(layout))
    np.testing.assert_array_equal(judged.objectives, phase1.front.objectives)
    small = judged.thinned(5)
    assert len(judged) > len(small) == 5
    random = np.random.default_rng(0)
    others = [judged.select(random.choice(len(judged), 5, replace=False)).hypervolume() for _ in range(50)]
    assert max(others) <= small.hypervolume() < judged.hypervolume()
