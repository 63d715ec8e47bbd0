"""pymoo on packed genomes: genomes are passed on unchanged, and take little memory."""

import tracemalloc
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks, fingerprint, pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits
from paretoprune.search.adaptive import AdaptiveVariation
from paretoprune.search.algorithms import Operators, make_algorithm
from paretoprune.search.corridor import Corridor
from paretoprune.search.phase2 import guided_algorithm
from paretoprune.search.problem import Problem
from paretoprune.search.pymoo_adapter import PackedCrossover, PackedDuplicates, PruningProblem, individuals
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.settings import Phase2
from pymoo.core.population import Population
from pymoo.core.termination import NoTermination
from searches import ALGORITHMS, SPARSE, Analytic, corridor_of, flat, in_corridor


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pymoo_hands_genomes_on_as_they_are(
    algorithm: str, evaluate: Analytic, phase1: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Genome] = []
    stack = PackedMasks.of_genomes

    def watched(genomes: Iterable[Genome], n_units: int) -> PackedMasks:
        listed = list(genomes)
        seen.extend(listed)
        return stack(listed, n_units)

    monkeypatch.setattr(PackedMasks, "of_genomes", watched)
    corridor = corridor_of(phase1.front, evaluate.layout)
    in_corridor(evaluate, corridor, phase1, [evaluate.scores], algorithm=algorithm)
    for flat_algorithm in (algorithm, *SPARSE):
        flat(evaluate, evaluate.layout, algorithm=flat_algorithm)
    assert len(seen) > 100
    for genome in seen:
        assert type(genome) is Genome
        assert genome.words.dtype == np.uint64
        # It is not a draft, it was not changed after its fingerprint was computed, and it is not a view.
        assert not genome.words.flags.writeable
        assert genome.fingerprint == fingerprint(genome.words)
        assert genome.words.base is None


def genomes_of(words: np.ndarray) -> np.ndarray:
    return individuals([Genome(row) for row in words])


def words_of(population: Any) -> np.ndarray:
    return np.array([genome.words for (genome,) in population.get("X")])


def test_equal_genomes_are_eliminated() -> None:
    words = pack_rows(np.random.default_rng(0).random((4, 130)) < 0.5)
    # They differ in the lowest bit only, which a distance of floats would not see.
    near = words[:1] ^ np.array([1, 0, 0], dtype=np.uint64)
    elimination = PackedDuplicates()
    candidates = Population.new("X", genomes_of(np.concatenate([words[:2], words[:1], near])))
    np.testing.assert_array_equal(words_of(elimination.do(candidates)), np.concatenate([words[:2], near]))
    against = elimination.do(candidates, Population.new("X", genomes_of(words[1:3])))
    np.testing.assert_array_equal(words_of(against), np.concatenate([words[:1], near]))
    assert len(elimination.do(candidates, candidates)) == 0


def test_nsga2_starts_with_genomes_that_differ_in_one_bit_only(layout: WeightUnits) -> None:
    first = pack_rows(np.random.default_rng(0).random((4, layout.n_weights)) < 0.5)
    first[1], first[2] = first[0], first[0]
    first[2, 0] ^= np.uint64(1)
    recorder = Recorder(Problem(layout, Analytic(layout)), budget=10, stage="flat")
    given = [Genome(row) for row in first]
    algorithm = make_algorithm("nsga2", 4, given, Operators(lambda a, b, rng: a.copy(), lambda g, rng: g, 0.5), 2)
    algorithm.setup(PruningProblem.packed(recorder), seed=0)
    np.testing.assert_array_equal(words_of(algorithm.ask()), first[[0, 2, 3]])
    # A genome that dies out must not stay in memory because of the list it came from.
    assert not given


def test_crossover_crosses_as_often_as_it_should_and_passes_either_parent_on_otherwise() -> None:
    zero, one = Genome(np.zeros(3, dtype=np.uint64)), Genome(np.ones(3, dtype=np.uint64))
    crossover = PackedCrossover(lambda first, second, rng: first | (second << np.uint64(1)), 0.3)
    pairs = np.array([zero, one], dtype=object)[:, None, None].repeat(1000, axis=1)
    (children,) = crossover._do(None, pairs, random_state=np.random.default_rng(0))
    n_crossed = sum(child not in (zero, one) for (child,) in children)
    assert n_crossed == pytest.approx(300, abs=45)
    for parent in (zero, one):
        assert sum(child is parent for (child,) in children) == pytest.approx(350, abs=45)


def guided(layout: WeightUnits, corridor: Corridor, algorithm: str, population: int) -> tuple[Any, AdaptiveVariation]:
    guides = [np.random.default_rng(i).random(layout.n_weights) for i in range(2)]
    rankings = [corridor.rank(scores) for scores in guides]
    settings = Phase2(algorithm=algorithm, crossover_probability=0.5)
    starts = PackedMasks.empty(layout.n_weights)
    return guided_algorithm(corridor, rankings, starts, settings, population, np.random.default_rng(0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_children_share_their_layers_up_to_some_boundary_with_a_parent(algorithm: str) -> None:
    layout = WeightUnits(tuple("abcdef"), ((100,),) * 6)
    chosen, variation = guided(
        layout, Corridor.between(np.ones(600, dtype=bool), np.zeros(600, dtype=bool), layout), algorithm, 20
    )
    problem = PruningProblem.packed(
        Recorder(Problem(layout, lambda m: 1 - m.density**2), budget=10_000, stage=""), variation.reward
    )
    chosen.setup(problem, termination=NoTermination(), seed=0)
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

        class Evaluate:
            problem = Problem(layout, lambda masks: masks.density)

            def __call__(self, masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
                words = np.bitwise_count(masks.words[:, ::1000]).sum(axis=1)
                return np.column_stack([1 - words / words.max(), masks.density]), words % 2 == 0

        problem = PruningProblem.packed(Evaluate(), variation.reward)
        chosen.setup(problem, termination=NoTermination(), seed=0)
        tracemalloc.reset_peak()
        for _ in range(5):
            children = chosen.ask()
            chosen.evaluator.eval(problem, children)
            chosen.tell(infills=children)
            # pymoo would keep its last offspring in memory, though most did not survive.
            children = chosen.off = None
        retained, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Parents, children, and the children's masks for the evaluator; one float per weight would be 8 more.
    assert peak < 3.2 * masks + rankings
    # After five generations, no genome that died out is still in memory.
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
    # All generations but a last one that the budget cuts short.
    assert len(told) >= 48
    assert 0 < sum(told) < len(told)
