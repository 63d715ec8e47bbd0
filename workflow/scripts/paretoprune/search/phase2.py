"""Phase 2: one bit per unit of the corridor, a binary search along importance."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pymoo.core.algorithm import Algorithm

from paretoprune.fronts import Front
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.adaptive import AdaptiveVariation
from paretoprune.search.algorithms import Operators, make_algorithm
from paretoprune.search.corridor import Corridor
from paretoprune.search.groups import MovingRanking, Ranking
from paretoprune.search.moves import one_point_crossover
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PruningProblem, Run
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.search.sampling import sample_bernoulli
from paretoprune.settings import Phase2

# Of several corridors, every fourth generation goes to the one that has waited longest.
WAITING_TURN = 4
# How much of what was expected of a corridor stays when its next generation is known.
GAIN_MEMORY = 0.5
# Fewest individuals of a corridor among several.
SMALLEST_POPULATION = 8

# A guide is a score of every unit, float (n_units,), or makes a ranking of a corridor that depends on the candidate.
Guide = np.ndarray | Callable[[Corridor], MovingRanking]


def search_corridor(
    problem: Problem,
    corridors: Sequence[Corridor],
    guides: Sequence[Guide],
    before: SearchResult,
    settings: Phase2,
    effort: Effort,
) -> SearchResult:
    """Phase 2: one bit per corridor unit, by NSGA-II or MOEA/D, merged with Phase 1's front.

    The first population holds Phase 1's members, moved into the corridor where they lie outside, and Bernoulli samples
    along the first guide at densities spread over the corridor. Several corridors have a population each, and every
    next generation goes to the corridor that is expected to add most hypervolume.

    Args:
        problem: What is searched.
        corridors: One or several parts of all masks.
        guides: What moves follow; the first must be a score, which also shapes the samples.
        before: Phase 1.
        settings: Algorithm and moves.
        effort: Number of masks to evaluate beyond those of Phase 1; the population is that of all corridors together.

    Raises:
        ValueError: The algorithm is unknown, the first guide is no score, or there is no corridor.

    Source:
        NSGA-II: Deb et al., 2002. MOEA/D: Zhang and Li, 2007, with Tchebycheff decomposition; both in pymoo.
    """
    if not guides or callable(guides[0]) or not corridors:
        raise ValueError("Phase 2 needs at least one importance score as guide and one corridor")
    recorder = Recorder(problem, budget=effort.evaluations, stage="phase2", before=before)
    rng = np.random.default_rng(effort.seed)
    population = effort.population
    if len(corridors) > 1:
        population = max(SMALLEST_POPULATION, population // len(corridors))
    runs = []
    for corridor in corridors:
        members = before.front if len(corridors) == 1 else _within(before.front, corridor)
        starts = members.thinned(max(2, population * 3 // 4)).masks
        ranked = [guide(corridor) if callable(guide) else corridor.rank(guide) for guide in guides]
        algorithm, variation = guided_algorithm(
            corridor, ranked, starts, settings, population, rng, n_objectives=len(problem.objectives)
        )
        runs.append(Run(algorithm, PruningProblem.packed(recorder, variation.reward), recorder, effort.seed))
    take_turns(runs, recorder)
    return recorder.result()


def _within(front: Front, corridor: Corridor) -> Front:
    """The members whose density a corridor can have."""
    sparsest, densest = PackedMasks(np.stack([corridor.lower, corridor.upper]), corridor.units.n_units).density
    density = front.masks.density
    return front.select(np.flatnonzero((density >= sparsest) & (density <= densest)))


def guided_algorithm(
    corridor: Corridor,
    rankings: Sequence[Ranking | MovingRanking],
    starts: PackedMasks,
    settings: Phase2,
    population: int,
    rng: np.random.Generator,
    *,
    n_objectives: int = 2,
) -> tuple[Algorithm, AdaptiveVariation]:
    """The algorithm of Phase 2, and the variation to be told of its successes.

    Args:
        corridor: What is searched.
        rankings: Of each guide, in the corridor; the first depends on no candidate.
        starts: Masks of the first population; samples fill it up.
        settings: Algorithm and moves.
        population: Size of the population.
        rng: Draws the samples.
        n_objectives: Loss and costs.

    Raises:
        ValueError: The algorithm is unknown, or the first ranking depends on the candidate.
    """
    groups, along = corridor.groups, rankings[0]
    if callable(along):
        raise ValueError("the first ranking shapes the first population and must not depend on a candidate; reorder")
    variation = AdaptiveVariation(groups, rankings, settings.softness, settings.first_rate, adaptive=settings.adaptive)
    members = [Genome(row) for row in corridor.restrict(starts).words]
    densities = np.linspace(0, 1, max(population - len(members), 1) + 2)[1:-1].tolist()
    samples = sample_bernoulli(groups, along, corridor.lower, densities, settings.softness, rng)
    operators = Operators(
        lambda a, b, random: one_point_crossover(a, b, groups, random),
        variation.vary,
        settings.crossover_probability,
    )
    first = _sparsest_first([*members, *map(Genome, samples)][:population])
    return make_algorithm(settings.algorithm, population, first, operators, n_objectives), variation


def _sparsest_first(genomes: Iterable[Genome]) -> list[Genome]:
    """In the order of MOEA/D's weight vectors, so that each member starts at its own trade-off."""
    return sorted(genomes, key=lambda genome: int(np.bitwise_count(genome.words).sum()))


def take_turns(runs: Sequence[Run], recorder: Recorder) -> None:
    """Give each next generation to the run that is expected to add most hypervolume for an evaluation.

    What a run is expected to add is what its last generations added, the latest counting most; a run that was never
    asked comes first. Every so often the one that has waited longest has its turn, or a single barren generation would
    shut it out for good.
    """
    gain = np.full(len(runs), np.inf)
    last_turn = np.zeros(len(runs), dtype=np.int64)
    turn = 0
    while any(not run.ended for run in runs):
        turn += 1
        running = np.array([not run.ended for run in runs])
        if turn % WAITING_TURN:
            chosen = int(np.argmax(np.where(running, gain, -np.inf)))
        else:
            chosen = int(np.argmin(np.where(running, last_turn, np.iinfo(np.int64).max)))
        evaluations, hypervolume = recorder.evaluations, recorder.front.hypervolume()
        runs[chosen].step()
        last_turn[chosen] = turn
        spent = recorder.evaluations - evaluations
        found = (recorder.front.hypervolume() - hypervolume) / spent if spent else 0.0
        gain[chosen] = found if np.isinf(gain[chosen]) else GAIN_MEMORY * gain[chosen] + (1 - GAIN_MEMORY) * found
    recorder.close_generation()
