"""The flat baselines: searches over whole masks in one phase, without importance scores and without a corridor."""

from collections.abc import Sequence

import numpy as np
from pymoo.core.algorithm import Algorithm
from pymoo.core.population import Population
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.search import sparse_ea
from paretoprune.search.algorithms import ALGORITHMS, Operators, make_algorithm, nsga2
from paretoprune.search.moves import flip_bits, uniform_crossover
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PackedDuplicates, PruningProblem, individuals, run_algorithm
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.search.sampling import sample_unguided
from paretoprune.settings import SPARSE_ALGORITHMS, Flat


def search_flat(problem: Problem, settings: Flat, effort: Effort) -> SearchResult:
    """Search whole masks in one phase, without importance scores.

    NSGA-II and MOEA/D start with random masks, and use uniform crossover and bit flips. SparseEA and MSKEA first
    compute scores of their own, and then follow these.

    Args:
        problem: What is searched.
        settings: The algorithm. With `nsga2` and `moead`, `flip_rate` is the probability of each bit to flip in a
            mutation. With `sparse_ea` and `mskea`, it is the smallest step as a share of the kept weights, and
            `score_share` is the share of the evaluations that scores take.
        effort: Number of masks to evaluate, those for scores included; population and seed.

    Raises:
        ValueError: The algorithm is unknown, or the budget does not pay for scores and a population.

    Source:
        See `search.sparse_ea` for SparseEA and MSKEA, and for how they are adapted to networks.
    """
    known = (*ALGORITHMS, *SPARSE_ALGORITHMS)
    if settings.algorithm not in known:
        raise ValueError(f"expected an algorithm among {', '.join(known)}, found '{settings.algorithm}'")
    recorder = Recorder(problem, budget=effort.evaluations, stage="flat")
    rng = np.random.default_rng(effort.seed)
    if settings.algorithm in SPARSE_ALGORITHMS:
        algorithm = sparse_algorithm(recorder, settings, effort.population, rng)
    else:
        algorithm = unguided_algorithm(problem, settings, effort.population, rng)
    run_algorithm(algorithm, PruningProblem.packed(recorder), recorder, effort.seed)
    return recorder.result()


def unguided_algorithm(problem: Problem, settings: Flat, population: int, rng: np.random.Generator) -> Algorithm:
    """NSGA-II or MOEA/D on random masks.

    Args:
        problem: What is searched.
        settings: See `search_flat`.
        population: Size of the population.
        rng: Draws the first population.
    """
    n_units = problem.units.n_units

    def flip(genomes: Sequence[Genome], random: np.random.Generator) -> list[Genome]:
        return [_flipped(genome, n_units, settings.flip_rate, random) for genome in genomes]

    densities = np.linspace(0.02, 1.0, population).tolist()
    first_population = [Genome(words) for words in sample_unguided(n_units, densities, rng)]
    operators = Operators(uniform_crossover, flip, 0.9)
    return make_algorithm(settings.algorithm, population, first_population, operators, len(problem.objectives))


def _flipped(genome: Genome, n_units: int, rate: float, rng: np.random.Generator) -> Genome:
    words = genome.edit()
    flip_bits(words, n_units, rate, rng)
    return Genome(words)


def sparse_algorithm(recorder: Recorder, settings: Flat, population: int, rng: np.random.Generator) -> Algorithm:
    """SparseEA or MSKEA, after it has evaluated groups of weights and a first sample; the budget pays for both.

    The first population are the best of the two together. Children always have two parents, and survival is that of
    NSGA-II. MSKEA's authors thin the last rank one by one as SPEA2 does; pymoo's pruning by the distances to the two
    nearest neighbours takes its place here.

    Args:
        recorder: Evaluates masks.
        settings: See `search_flat`.
        population: Size of the population.
        rng: Draws the first sample and, for MSKEA, what leads each generation.

    Raises:
        ValueError: The budget does not pay for groups and a population, or the units are not weights.
    """
    name, units = settings.algorithm, recorder.problem.units
    if not isinstance(units, WeightUnits):
        raise ValueError(
            f"{name} groups weights by their output filters and takes no other units; choose nsga2 or moead"
        )
    n_groups = sparse_ea.n_groups_within(recorder.budget, settings.score_share)
    if recorder.budget < n_groups + population:
        raise ValueError(
            f"{name} needs at least {n_groups + population} evaluations ({n_groups} groups of weights and a population "
            f"of {population}), found {recorder.budget}; raise `evaluations`, or lower `population` or `score_share`"
        )
    offsets = sparse_ea.cut_into_groups(units, n_groups)
    without_group = sparse_ea.masks_without_each(offsets)
    objectives_without_group, _ = recorder(without_group)
    recorder.close_generation()
    _, ranks = NonDominatedSorting().do(objectives_without_group, return_rank=True)
    penalties = sparse_ea.penalties_of_weights(offsets, ranks)
    samples = sparse_ea.sample_by_tournaments(penalties, population, rng)
    sampled = PackedMasks.of_genomes(map(Genome, samples), units.n_units)
    objectives_sampled, _ = recorder(sampled)
    recorder.close_generation()

    survival = RankAndCrowding(crowding_func="2nn" if name == "mskea" else "cd")
    genomes = [Genome(row) for masks in (without_group, sampled) for row in masks.words]
    objectives = np.concatenate([objectives_without_group, objectives_sampled])
    pool = Population.new("X", individuals(genomes), "F", objectives)
    problem = PruningProblem.packed(recorder)
    best = survival.do(problem, PackedDuplicates().do(pool), n_survive=population, random_state=rng)
    first_population, n_objectives = [individual.X[0] for individual in best], objectives.shape[1]
    if name == "sparse_ea":
        variation = sparse_ea.TournamentVariation(penalties, settings.flip_rate)
        operators = Operators(variation.cross, variation.vary, 1.0)
        return nsga2(population, first_population, operators, n_objectives, survival=survival)
    staged = sparse_ea.StagedVariation(penalties, settings.flip_rate)

    def learn(algorithm: Algorithm) -> None:
        front = [individual.X[0] for individual in algorithm.pop if individual.get("rank") == 0]
        staged.learn(front, recorder.evaluations / recorder.budget, rng)

    operators = Operators(staged.cross, staged.vary, 1.0)
    return nsga2(population, first_population, operators, n_objectives, survival=survival, callback=learn)
