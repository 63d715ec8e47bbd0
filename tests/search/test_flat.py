"""The flat baselines."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from paretoprune.fronts import Front
from paretoprune.importance.allocation import allocate
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups
from paretoprune.search import flat as flat_module
from paretoprune.search import sparse_ea as sparse
from paretoprune.search.algorithms import nsga2
from paretoprune.search.problem import Problem
from paretoprune.search.sweep import sweep_allocation
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from searches import ALGORITHMS, DENSITIES, SPARSE, Analytic, allocation_sweep, assert_sound, flat, n_distinct, same


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *SPARSE])
@pytest.mark.parametrize("evaluations", [14, 41, 90])
def test_the_flat_search_spends_its_budget_exactly(algorithm: str, evaluations: int, evaluate: Analytic) -> None:
    result = flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=evaluations)
    assert n_distinct(evaluate.seen) == len(evaluate.seen)
    assert len(evaluate.seen) == result.history[-1]["evaluations"] == evaluations
    assert set(result.front.stages) == {"flat"}


@pytest.mark.parametrize("algorithm", SPARSE)
def test_scores_and_the_first_population_are_paid_for(algorithm: str, evaluate: Analytic) -> None:
    result = flat(evaluate, evaluate.layout, algorithm=algorithm, score_share=0.11)
    masks = evaluate.booleans()
    # A tenth of 90; the masks without a group are evaluated first.
    np.testing.assert_array_equal((~masks[:9]).sum(axis=0), np.ones(evaluate.layout.n_weights))
    assert [row["evaluations"] for row in result.history[:2]] == [9, 21]
    assert 0 < masks[9:21].mean(axis=1).min() < 0.4 < 0.9 < masks[9:21].mean(axis=1).max() < 1


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_sparse_search_goes_on_from_the_best_it_has_evaluated(
    algorithm: str, evaluate: Analytic, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[Genome]] = []
    make = nsga2

    def watched(population: int, first: list[Genome], *args: Any, **kwargs: Any) -> Any:
        given.append(list(first))
        return make(population, first, *args, **kwargs)

    monkeypatch.setattr(flat_module, "nsga2", watched)
    flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=90, score_share=0.2)
    evaluated = evaluate.seen.select(np.arange(18 + 12))
    ((first),) = given
    assert len(first) == 12
    taken = {genome.fingerprint for genome in first}
    objectives = Analytic(evaluate.layout).objectives(evaluated)
    by_rank = [set(evaluated.select(rank).fingerprints()) for rank in NonDominatedSorting().do(objectives)]
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
        assert (
            len(Front.empty(masks.n_units).merge(Front(masks, evaluate.objectives(masks), ["x"] * len(masks))))
            == len(masks)
            > 0
        )
        told.append(spent)
        learn(self, front, spent, rng)

    evaluate = Analytic(evaluate.layout)
    monkeypatch.setattr(sparse.StagedVariation, "learn", watched)
    result = flat(evaluate, evaluate.layout, algorithm="mskea", evaluations=150, score_share=0.1)
    # Once before each generation that spends evaluations, after the scores and the first population.
    spent = [row["evaluations"] / 150 for row in result.history[1:-1]]
    assert [share for share in dict.fromkeys(told) if share < 1] == spent


@pytest.mark.parametrize("algorithm", SPARSE)
def test_what_scores_tell_is_worth_what_they_cost(algorithm: str) -> None:
    layout = WeightUnits(("a", "b"), ((40, 50), (40, 50)))
    useful = np.repeat(np.arange(80) % 20 < 5, 50)

    def evaluate(masks: PackedMasks) -> np.ndarray:
        kept = np.array([masks.unpack(i)[useful].mean() for i in range(len(masks))])
        return 1 - kept**2

    settings: dict[str, Any] = {"evaluations": 400, "seed": 1}
    unguided = flat(evaluate, layout, algorithm="nsga2", **settings).front.hypervolume()
    scored = flat(evaluate, layout, algorithm=algorithm, score_share=0.1, **settings).front.hypervolume()
    unscored = flat(evaluate, layout, algorithm=algorithm, score_share=0.001, **settings).front.hypervolume()
    assert scored > unguided + 0.05
    assert scored > unscored + 0.05


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_budget_without_a_population_beside_the_scores_is_refused(algorithm: str, evaluate: Analytic) -> None:
    expected = rf"{algorithm} needs at least 14 evaluations \(2 groups .* population of 12\), found 13; raise"
    with pytest.raises(ValueError, match=expected):
        flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=13)
    with pytest.raises(ValueError, match="needs at least 84 evaluations"):
        flat(evaluate, evaluate.layout, algorithm=algorithm, evaluations=80, score_share=0.9)
    assert len(evaluate.seen) == 0


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_sparse_search_runs_dry_where_there_are_few_masks(algorithm: str) -> None:
    tiny = WeightUnits(("a", "b", "c"), ((3,), (2,), (2,)))
    evaluate = Analytic(tiny)
    flat(evaluate, tiny, algorithm=algorithm, evaluations=500, score_share=0.01)
    assert n_distinct(evaluate.seen) == len(evaluate.seen) <= 2**7 - 1
    assert evaluate.seen.n_kept.min() >= 1


@pytest.mark.parametrize("algorithm", SPARSE)
def test_a_sparse_search_holds_its_population_as_bits(algorithm: str) -> None:
    n, population = 200_000, 200
    layout = WeightUnits(("a", "b"), ((100, n // 200), (100, n // 200)))
    masks = population * n / 8

    def evaluate(masks: PackedMasks) -> np.ndarray:
        words = np.bitwise_count(masks.words[:, ::100]).sum(axis=1)
        return 1 - words / words.max()

    tracemalloc.start()
    try:
        settings: dict[str, Any] = {"evaluations": 1000, "population": population, "score_share": 0.01}
        flat(evaluate, layout, algorithm=algorithm, **settings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Parents, children, the children's masks for the evaluator, and the front, besides a few numbers per weight for
    # penalties and votes and for the current child. One byte a weight of every mask would be 8 masks more.
    assert peak < 5 * masks + 80 * n


def test_the_allocation_sweep_evaluates_each_density_once(evaluate: Analytic) -> None:
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


def test_densities_that_round_to_the_same_counts_are_evaluated_once(evaluate: Analytic) -> None:
    counts = allocate("uniform", evaluate.scores, evaluate.layout, 0.5)
    result = sweep_allocation(Problem(evaluate.layout, evaluate), evaluate.scores, [counts, counts])
    assert len(evaluate.seen) == len(result.front) == len(result.history) == 1
