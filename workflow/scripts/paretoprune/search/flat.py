"""The single-phase baselines: whole masks, without importance scores and without a corridor."""

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
from paretoprune.search.sampling import sample_blind
from paretoprune.settings import SPARSE_ALGORITHMS, Flat


def search_flat(problem: Problem, settings: Flat, effort: Effort) -> SearchResult:
    """The single-phase baselines, on whole masks and without importance scores.

    NSGA-II or MOEA/D with random masks at first, uniform crossover and bit flips; or SparseEA or MSKEA, which start
    with scores of their own and follow these.

    Args:
        problem: What is searched.
        settings: `flip_rate` is the probability of each bit to flip in a mutation; of `sparse_ea` and `mskea` the
            smallest step, as a share of the kept weights. `score_share` of the evaluations evaluate groups of weights.
        effort: Number of masks to evaluate, those for scores included.

    Raises:
        ValueError: The algorithm is unknown, or the budget pays for scores but no population.

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
        algorithm = blind_algorithm(problem, settings, effort.population, rng)
    run_algorithm(algorithm, PruningProblem.packed(recorder), recorder, effort.seed)
    return recorder.result()


def blind_algorithm(problem: Problem, settings: Flat, population: int, rng: np.random.Generator) -> Algorithm:
    """NSGA-II or MOEA/D on random masks; arguments as for `search_flat`, `rng` draws the first population."""
    n_units = problem.units.n_units

    def flip(genomes: Sequence[Genome], random: np.random.Generator) -> list[Genome]:
        return [_flipped(genome, n_units, settings.flip_rate, random) for genome in genomes]

    densities = np.linspace(0.02, 1.0, population).tolist()
    first = [Genome(words) for words in sample_blind(n_units, densities, rng)]
    operators = Operators(uniform_crossover, flip, 0.9)
    return make_algorithm(settings.algorithm, population, first, operators, len(problem.objectives))


def _flipped(genome: Genome, n_units: int, rate: float, rng: np.random.Generator) -> Genome:
    words = genome.edit()
    flip_bits(words, n_units, rate, rng)
    return Genome(words)


def sparse_algorithm(recorder: Recorder, settings: Flat, population: int, rng: np.random.Generator) -> Algorithm:
    """SparseEA or MSKEA, once it has evaluated the groups of weights and its first population; both are paid for.

    Its population at the start are the best of the two together. Children always have two parents, and survive as in
    NSGA-II; MSKEA's authors thin the last rank one by one, as SPEA2 does, for which pymoo's pruning by the distances to
    the two nearest neighbours stands in.

    Args:
        recorder: Evaluates masks.
        settings: See `search_flat`.
        population: Size of the population.
        rng: Draws the first population and, for MSKEA, what leads each generation.

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
    bounds = sparse_ea.cut_into_groups(units, n_groups)
    without_group = sparse_ea.masks_without_each(bounds)
    answers, _ = recorder(without_group)
    recorder.close_generation()
    _, fronts = NonDominatedSorting().do(answers, return_rank=True)
    costs = sparse_ea.costs_of_weights(bounds, fronts)
    samples = sparse_ea.sample_by_tournaments(costs, population, rng)
    drawn = PackedMasks.of_genomes(map(Genome, samples), units.n_units)
    objectives, _ = recorder(drawn)
    recorder.close_generation()

    survival = RankAndCrowding(crowding_func="2nn" if name == "mskea" else "cd")
    genomes = [Genome(row) for masks in (without_group, drawn) for row in masks.words]
    pool = Population.new("X", individuals(genomes), "F", np.concatenate([answers, objectives]))
    problem = PruningProblem.packed(recorder)
    best = survival.do(problem, PackedDuplicates().do(pool), n_survive=population, random_state=rng)
    first, n_objectives = [individual.X[0] for individual in best], answers.shape[1]
    if name == "sparse_ea":
        simple = sparse_ea.TournamentVariation(costs, settings.flip_rate)
        return nsga2(population, first, Operators(simple.cross, simple.vary, 1.0), n_objectives, survival=survival)
    staged = sparse_ea.StagedVariation(costs, settings.flip_rate)

    def learn(algorithm: Algorithm) -> None:
        front = [individual.X[0] for individual in algorithm.pop if individual.get("rank") == 0]
        staged.learn(front, recorder.evaluations / recorder.budget, rng)

    operators = Operators(staged.cross, staged.vary, 1.0)
    return nsga2(population, first, operators, n_objectives, survival=survival, callback=learn)
