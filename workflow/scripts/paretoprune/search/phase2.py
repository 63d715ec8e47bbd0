"""Phase 2: a search over one bit per unit of the corridor, guided by importance."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pymoo.core.algorithm import Algorithm

from paretoprune.fronts import Front
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.adaptive import AdaptiveVariation
from paretoprune.search.algorithms import Operators, make_algorithm
from paretoprune.search.corridor import Corridor
from paretoprune.search.groups import CandidateRanking, Ranking
from paretoprune.search.moves import one_point_crossover
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PruningProblem, Run
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.search.sampling import sample_bernoulli
from paretoprune.settings import Phase2

# With several corridors, every fourth generation goes to the one that has waited longest.
WAITING_TURN = 4
# Weight of a corridor's earlier generations, against its latest one, in what it is expected to gain.
GAIN_MEMORY = 0.5
# With several corridors, the smallest population of one.
SMALLEST_POPULATION = 8

# A guide is a score of every unit, float (n_units,), or a function from a corridor to a ranking of its units that
# depends on the candidate.
Guide = np.ndarray | Callable[[Corridor], CandidateRanking]


def search_corridor(
    problem: Problem,
    corridors: Sequence[Corridor],
    guides: Sequence[Guide],
    previous: SearchResult,
    settings: Phase2,
    effort: Effort,
) -> SearchResult:
    """Search one bit per unit of the corridors by NSGA-II or MOEA/D, and merge the result with Phase 1's front.

    The first population holds members of Phase 1's front, moved into the corridor where they lie outside, and
    Bernoulli samples along the first guide at densities spread over the corridor. Each of several corridors has a
    population of its own. The next generation always goes to the corridor that is expected to add most hypervolume, see
    `take_turns`.

    Args:
        problem: What is searched.
        corridors: One or several.
        guides: What moves follow. The first one must be a score; samples follow it too.
        previous: The result of Phase 1.
        settings: Algorithm and moves.
        effort: Number of masks to evaluate beyond those of Phase 1, the population of all corridors together, the seed.

    Raises:
        ValueError: The algorithm is unknown, the first guide is no score, or there is no corridor.

    Source:
        NSGA-II: Deb et al., 2002. MOEA/D: Zhang and Li, 2007, with Tchebycheff decomposition; both in pymoo.
    """
    if not guides or callable(guides[0]) or not corridors:
        raise ValueError("Phase 2 needs at least one importance score as guide and one corridor")
    recorder = Recorder(problem, budget=effort.evaluations, stage="phase2", previous=previous)
    rng = np.random.default_rng(effort.seed)
    population = effort.population
    if len(corridors) > 1:
        population = max(SMALLEST_POPULATION, population // len(corridors))
    runs = []
    for corridor in corridors:
        members = previous.front if len(corridors) == 1 else _members_within(previous.front, corridor)
        starts = members.thinned(max(2, population * 3 // 4)).masks
        rankings = [guide(corridor) if callable(guide) else corridor.rank(guide) for guide in guides]
        algorithm, variation = guided_algorithm(
            corridor, rankings, starts, settings, population, rng, n_objectives=len(problem.objectives)
        )
        runs.append(Run(algorithm, PruningProblem.packed(recorder, variation.reward), recorder, effort.seed))
    take_turns(runs, recorder)
    return recorder.result()


def _members_within(front: Front, corridor: Corridor) -> Front:
    """The members whose density lies between those of the corridor's ends."""
    sparsest, densest = PackedMasks(np.stack([corridor.lower, corridor.upper]), corridor.units.n_units).density
    density = front.masks.density
    return front.select(np.flatnonzero((density >= sparsest) & (density <= densest)))


def guided_algorithm(
    corridor: Corridor,
    rankings: Sequence[Ranking | CandidateRanking],
    starts: PackedMasks,
    settings: Phase2,
    population: int,
    rng: np.random.Generator,
    *,
    n_objectives: int = 2,
) -> tuple[Algorithm, AdaptiveVariation]:
    """Make the algorithm of Phase 2 in one corridor.

    Args:
        corridor: What is searched.
        rankings: One for each guide, of the corridor's groups; the first one must not depend on the candidate.
        starts: Masks of the first population; samples fill it up.
        settings: Algorithm and moves.
        population: Size of the population.
        rng: Draws the samples.
        n_objectives: Number of objectives, the loss included.

    Returns:
        The algorithm, and its variation, which learns from `AdaptiveVariation.reward`.

    Raises:
        ValueError: The algorithm is unknown, or the first ranking depends on the candidate.
    """
    groups, ranking = corridor.groups, rankings[0]
    if callable(ranking):
        raise ValueError("the first ranking shapes the first population and must not depend on a candidate; reorder")
    variation = AdaptiveVariation(groups, rankings, settings.softness, settings.first_rate, adaptive=settings.adaptive)
    members = [Genome(row) for row in corridor.restrict(starts).words]
    densities = np.linspace(0, 1, max(population - len(members), 1) + 2)[1:-1].tolist()
    samples = sample_bernoulli(groups, ranking, corridor.lower, densities, settings.softness, rng)
    operators = Operators(
        lambda a, b, random: one_point_crossover(a, b, groups, random),
        variation.vary,
        settings.crossover_probability,
    )
    first_population = _sparsest_first([*members, *map(Genome, samples)][:population])
    return make_algorithm(settings.algorithm, population, first_population, operators, n_objectives), variation


def _sparsest_first(genomes: Iterable[Genome]) -> list[Genome]:
    """Sort by density: MOEA/D's weight vectors have that order, so that each member starts at a suitable trade-off."""
    return sorted(genomes, key=lambda genome: int(np.bitwise_count(genome.words).sum()))


def take_turns(runs: Sequence[Run], recorder: Recorder) -> None:
    """Give each next generation to the run that is expected to add most hypervolume per evaluation.

    A run is expected to add what its last generations added on average, the latest ones weighted most. Every
    `WAITING_TURN`-th generation goes to the run that has waited longest instead.

    Args:
        runs: One for each corridor.
        recorder: Of all runs.
    """
    # Infinite until its first generation: every run has one before any has a second.
    gain = np.full(len(runs), np.inf)
    last_turn = np.zeros(len(runs), dtype=np.int64)
    turn = 0
    while any(not run.ended for run in runs):
        turn += 1
        running = np.array([not run.ended for run in runs])
        # Without waiting turns, a single generation that adds nothing would shut a run out for good.
        if turn % WAITING_TURN:
            chosen = int(np.argmax(np.where(running, gain, -np.inf)))
        else:
            chosen = int(np.argmin(np.where(running, last_turn, np.iinfo(np.int64).max)))
        evaluations, hypervolume = recorder.evaluations, recorder.front.hypervolume()
        runs[chosen].step()
        last_turn[chosen] = turn
        spent = recorder.evaluations - evaluations
        added = (recorder.front.hypervolume() - hypervolume) / spent if spent else 0.0
        gain[chosen] = added if np.isinf(gain[chosen]) else GAIN_MEMORY * gain[chosen] + (1 - GAIN_MEMORY) * added
    recorder.close_generation()
