"""The searches: Phase 1 over thresholds, Phase 2 over the corridor, flat over all masks, and the allocation baselines.

pymoo's algorithms run unmodified; only this module knows them. Genomes are decoded to masks, judged by an evaluator,
and every judged mask passes a `Recorder`, which keeps the front of all of them and the course of the search.
"""

import csv
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pymoo.algorithms.moo.moead import ParallelMOEAD
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.algorithm import Algorithm
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from pymoo.util.ref_dirs import get_reference_directions

from paretoprune.fronts import Front
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups
from paretoprune.search import operators
from paretoprune.search import sparse_ea as sparse
from paretoprune.search.corridor import Corridor
from paretoprune.search.survival import Survival, survival_of

HISTORY_COLUMNS = ("generation", "evaluations", "seconds", "hypervolume", "stage")
ALGORITHMS = ("nsga2", "moead")
# Those that judge groups of weights before they start, see `search.sparse_ea`.
SPARSE_ALGORITHMS = ("sparse_ea", "mskea")
# Generations without a single new mask after which a search has run dry.
PATIENCE = 50
# Of several corridors, every so manieth generation goes to the one that has waited longest.
WAITING_TURN = 4
# How much of what was expected of a corridor stays when its next generation is known.
GAIN_MEMORY = 0.5
# Fewest individuals of a corridor among several.
SMALLEST_POPULATION = 8
# Sparsest rung of a ladder, as a share of a layer.
LOWEST_RUNG = 0.005

Evaluate = Callable[[PackedMasks], np.ndarray]
Progress = Callable[[dict[str, Any]], None]
Allowed = Callable[[PackedMasks], np.ndarray]


@dataclass
class SearchResult:
    """What a search leaves behind.

    Attributes:
        front: Every non-dominated network that was judged, sparsest first.
        history: One row a generation with the keys `HISTORY_COLUMNS`; evaluations and seconds are cumulative.
    """

    front: Front
    history: list[dict[str, Any]]


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a history written with the columns `HISTORY_COLUMNS`."""
    kinds = {"generation": int, "evaluations": int, "seconds": float, "hypervolume": float, "stage": str}
    with Path(path).open(newline="", encoding="utf-8") as handle:
        return [{key: kinds[key](row[key]) for key in HISTORY_COLUMNS} for row in csv.DictReader(handle)]


@runtime_checkable
class BoundedEvaluate(Protocol):
    """An evaluator that can stop judging a mask whose error is certain to lie above a bound."""

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Masks to objectives (n, 2)."""
        ...

    def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks and bounds (n,) to objectives (n, 2) and whether each is complete, bool (n,); otherwise its error is a
        lower bound, above the given one.
        """
        ...


@dataclass(frozen=True)
class _Judged:
    """Objectives (2,) of a mask; unless complete, the error is a lower bound."""

    objectives: np.ndarray
    complete: bool
    allowed: bool = True


class _BudgetSpentError(Exception):
    """More masks were to be judged than the budget of a search allows."""


class Recorder:
    """Judges masks, each distinct one once, and remembers the non-dominated.

    Args:
        evaluate: Masks to objectives (n, 2).
        n_weights: Weights of a mask.
        budget: Largest number of masks to judge.
        stage: Name given to what is found from now on; may be changed.
        before: A search that this one continues: its front is the first front, its history comes first.
        progress: Called with each new history row.
        allowed: Which masks may be published, bool (n,); others are not judged, count as wrong on every image and never
            join the front. None to allow all.

    Attributes:
        survival: What becomes of the masks judged next, so that judging those that it drops anyway may stop early;
            None to judge all in full.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        n_weights: int,
        *,
        budget: int,
        stage: str,
        before: SearchResult | None = None,
        progress: Progress | None = None,
        allowed: Allowed | None = None,
    ) -> None:
        self._evaluate, self._allowed = evaluate, allowed
        self._progress = progress
        self._known: dict[bytes, _Judged] = {}
        self._start = time.perf_counter()
        self.stage = stage
        self.budget = budget
        self.evaluations = 0
        self.front = before.front if before else Front.empty(n_weights)
        self.history = list(before.history) if before else []
        last = self.history[-1] if self.history else {"generation": 0, "evaluations": 0, "seconds": 0.0}
        self._offset = {key: last[key] for key in ("generation", "evaluations", "seconds")}
        self._generations = self._closed_at = 0
        if before:
            keys = before.front.masks.fingerprints()
            self._known.update((key, _Judged(f, True)) for key, f in zip(keys, before.front.objectives, strict=True))
        self.survival: Survival | None = None

    @property
    def remaining(self) -> int:
        """How many masks may still be judged."""
        return self.budget - self.evaluations

    def __call__(self, masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
        """Judge masks.

        Returns:
            Objectives (n, 2), and whether each mask is new and on the front, bool (n,). Where `survival` is given, the
            error of a mask that it drops in any case may be a lower bound.

        Raises:
            _BudgetSpentError: There are more new masks than the budget pays for; those that it does pay for are judged.
        """
        keys, density = masks.fingerprints(), masks.density
        first_at = {key: i for i, key in reversed(list(enumerate(keys)))}
        fresh = sorted(i for key, i in first_at.items() if key not in self._known)
        unpaid = len(fresh) - self.remaining
        fresh = fresh[: self.remaining]
        bounds = np.full(len(keys), np.inf)
        if self.survival is not None:
            bounds = self.survival.bounds(density, self.front.objectives)
        self._judge(masks, keys, fresh, bounds)
        self.evaluations += len(fresh)
        # The others are dominated: that is why judging them stopped.
        whole = [i for i in fresh if self._known[keys[i]].complete and self._known[keys[i]].allowed]
        joined: set[bytes] = set()
        if whole:
            judged = np.array([self._known[keys[i]].objectives for i in whole])
            self.front = self.front.merge(Front(masks.select(whole), judged, [self.stage] * len(whole)))
            joined = {keys[i] for i in whole}.intersection(self.front.masks.fingerprints())
        if unpaid > 0:
            raise _BudgetSpentError
        while self.survival is not None:
            known = [self._known[key] for key in keys]
            open_ = self.survival.undecided(
                np.array([j.objectives for j in known]), np.array([j.complete for j in known])
            )
            again = sorted({first_at[keys[i]] for i in np.flatnonzero(open_)})
            if not again:
                break
            self._judge(masks, keys, again, np.full(len(keys), np.inf))
        return (
            np.array([self._known[key].objectives for key in keys]).reshape(-1, 2),
            np.array([key in joined for key in keys], dtype=bool),
        )

    def _judge(self, masks: PackedMasks, keys: list[bytes], which: list[int], bounds: np.ndarray) -> None:
        """Have some masks judged, each up to its bound, and remember what came out."""
        if self._allowed is not None and which:
            good = self._allowed(masks.select(which))
            for i, density in zip(which, masks.select(which).density, strict=True):
                self._known[keys[i]] = _Judged(np.array([1.0, density]), True, allowed=False)
            which = [i for i, fine in zip(which, good, strict=True) if fine]
        if not which:
            return
        chosen = masks if len(which) == len(masks) else masks.select(which)
        complete = np.ones(len(which), dtype=bool)
        if isinstance(self._evaluate, BoundedEvaluate):
            objectives, complete = self._evaluate.bounded(chosen, bounds[which])
        else:
            objectives = np.asarray(self._evaluate(chosen), dtype=np.float64)
        if objectives.shape != (len(which), 2) or not np.isfinite(objectives).all():
            raise ValueError(
                f"expected finite objectives of shape ({len(which)}, 2) from the evaluator, found shape "
                f"{objectives.shape} with {int((~np.isfinite(objectives)).sum())} values that are not finite"
            )
        for i, values, whole in zip(which, objectives, complete, strict=True):
            self._known[keys[i]] = _Judged(values, bool(whole))

    def close_generation(self) -> None:
        """Add a row to the history, unless nothing was judged since the last one."""
        if self.evaluations == self._closed_at:
            return
        self._closed_at = self.evaluations
        self._generations += 1
        row = {
            "generation": self._offset["generation"] + self._generations,
            "evaluations": self._offset["evaluations"] + self.evaluations,
            "seconds": round(self._offset["seconds"] + time.perf_counter() - self._start, 3),
            "hypervolume": self.front.hypervolume(),
            "stage": self.stage,
        }
        self.history.append(row)
        if self._progress:
            self._progress(row)

    def result(self) -> SearchResult:
        """Front and history so far."""
        return SearchResult(self.front, self.history)


class PruningProblem(Problem):
    """pymoo's view of pruning: individuals decode to masks, and the recorder judges them.

    Args:
        n_var: Variables of an individual.
        decode: Individuals (n, n_var) to masks.
        recorder: Judges masks.
        reward: Told of each packed genome whether its mask joined the front.
        bounds: Lower and upper bound of real-valued individuals; packed genomes have none, or pymoo would touch them.
    """

    def __init__(
        self,
        n_var: int,
        decode: Callable[[np.ndarray], PackedMasks],
        recorder: Callable[[PackedMasks], tuple[np.ndarray, np.ndarray]],
        reward: Callable[[Genome, bool], None] | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        low, high = bounds or (None, None)
        super().__init__(n_var=n_var, n_obj=2, xl=low, xu=high)
        self._decode, self._recorder, self._reward = decode, recorder, reward

    @classmethod
    def packed(
        cls,
        n_weights: int,
        recorder: Callable[[PackedMasks], tuple[np.ndarray, np.ndarray]],
        reward: Callable[[Genome, bool], None] | None = None,
    ) -> "PruningProblem":
        """The problem whose individuals are genomes: object arrays (n, 1), of which pymoo copies the pointers only."""
        return cls(1, lambda x: PackedMasks.of_genomes(x[:, 0], n_weights), recorder, reward)

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"], joined = self._recorder(self._decode(x))
        if self._reward:
            for (genome,), success in zip(x, joined, strict=True):
                self._reward(genome, bool(success))


def _individuals(genomes: Sequence[Genome]) -> np.ndarray:
    """Genomes as pymoo's variables: an object array (n, 1)."""
    x = np.empty((len(genomes), 1), dtype=object)
    x[:, 0] = genomes
    return x


class _PackedDuplicates(DuplicateElimination):
    """Finds equal genomes by fingerprint, where pymoo's default would compute a float distance of all pairs."""

    def _do(self, pop: Population, other: Population | None, is_duplicate: np.ndarray) -> np.ndarray:
        seen = {individual.X[0].fingerprint for individual in other} if other is not None else set()
        for i, individual in enumerate(pop):
            key = individual.X[0].fingerprint
            is_duplicate[i] = key in seen
            if other is None:
                seen.add(key)
        return is_duplicate


class _PackedCrossover(Crossover):
    """Two genomes to one draft of a child by a function (first, second, rng) -> words, or one parent as it is."""

    def __init__(
        self, cross: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray], probability: float
    ) -> None:
        # pymoo would have all pairs crossed, and then take no notice of those that its own probability spares.
        super().__init__(n_parents=2, n_offsprings=1, prob=1.0)
        self._cross, self._probability = cross, probability

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        pairs = zip(x[0, :, 0], x[1, :, 0], strict=True)
        return _individuals([self._child(first, second, random_state) for first, second in pairs])[None]

    def _child(self, first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
        if rng.random() < self._probability:
            return Genome(self._cross(first.words, second.words, rng), draft=True)
        return first if rng.random() < 0.5 else second


class _PackedMutation(Mutation):
    """Changes genomes by a function (genomes, rng) -> genomes."""

    def __init__(self, vary: Callable[[Sequence[Genome], np.random.Generator], Sequence[Genome]]) -> None:
        super().__init__()
        self._vary = vary

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        return _individuals(self._vary(x[:, 0].tolist(), random_state))


class _Run:
    """One of pymoo's algorithms, asked and told generation by generation."""

    def __init__(self, algorithm: Algorithm, problem: PruningProblem, recorder: Recorder, seed: int) -> None:
        algorithm.setup(problem, termination=NoTermination(), seed=seed)
        self._algorithm, self._problem, self._recorder = algorithm, problem, recorder
        self._dry = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether nothing new can be expected, or nothing more can be paid for."""
        return self._ended or self._dry >= PATIENCE or self._recorder.remaining <= 0

    def step(self) -> None:
        """Judge one more generation, as far as the budget pays for it."""
        recorder, algorithm = self._recorder, self._algorithm
        before = recorder.evaluations
        candidates = algorithm.ask()
        if candidates is None or not len(candidates):
            self._ended = True
            return
        recorder.survival = survival_of(algorithm)
        try:
            algorithm.evaluator.eval(self._problem, candidates)
        except _BudgetSpentError:
            self._ended = True
            return
        recorder.close_generation()
        algorithm.tell(infills=candidates)
        # pymoo remembers its last offspring, most of which are dead by now.
        candidates = algorithm.off = None
        self._dry = 0 if recorder.evaluations > before else self._dry + 1


def run_algorithm(algorithm: Algorithm, problem: PruningProblem, recorder: Recorder, seed: int) -> None:
    """Let a pymoo algorithm ask and tell until the budget is spent, exactly."""
    run = _Run(algorithm, problem, recorder, seed)
    while not run.ended:
        run.step()
    recorder.close_generation()


def _run_by_gain(runs: Sequence[_Run], recorder: Recorder) -> None:
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
        open_ = np.array([not run.ended for run in runs])
        if turn % WAITING_TURN:
            chosen = int(np.argmax(np.where(open_, gain, -np.inf)))
        else:
            chosen = int(np.argmin(np.where(open_, last_turn, np.iinfo(np.int64).max)))
        evaluations, hypervolume = recorder.evaluations, recorder.front.hypervolume()
        runs[chosen].step()
        last_turn[chosen] = turn
        spent = recorder.evaluations - evaluations
        found = (recorder.front.hypervolume() - hypervolume) / spent if spent else 0.0
        gain[chosen] = found if np.isinf(gain[chosen]) else GAIN_MEMORY * gain[chosen] + (1 - GAIN_MEMORY) * found
    recorder.close_generation()


def ladder_of_densities(n_rungs: int) -> np.ndarray:
    """Densities that a layer may have on a ladder, evenly spaced in their logarithm, sparsest first, 1 last."""
    return np.geomspace(LOWEST_RUNG, 1.0, n_rungs)


class _LevelSwitches(Mutation):
    """Some individuals are moved along the ladder at constant total density, the others by another mutation.

    Args:
        rungs: float (n_rungs,), densities.
        sizes: int (n_layers,), weights of each layer.
        share: Probability of a level switch.
        otherwise: What else an individual is varied by.
    """

    def __init__(self, rungs: np.ndarray, sizes: np.ndarray, share: float, otherwise: Mutation) -> None:
        super().__init__(prob=1.0)
        self._rungs, self._share, self._otherwise = rungs, share, otherwise
        self._n_kept = np.rint(rungs * sizes[:, None]).astype(np.int64)

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        varied = self._otherwise._do(problem, x.copy(), *args, random_state=random_state, **kwargs)
        for i in np.flatnonzero(random_state.random(len(x)) < self._share):
            levels = operators.nearest_rungs(1.0 - x[i], self._rungs)
            varied[i] = 1.0 - self._rungs[operators.switch_levels(levels, self._n_kept, random_state)]
        return varied


def search_thresholds(
    evaluate: Evaluate,
    layout: WeightUnits,
    scores: np.ndarray,
    starts: Sequence[np.ndarray],
    *,
    evaluations: int,
    population: int,
    seed: int,
    rungs: int | None = None,
    level_switches: float = 0.0,
    n_reselected: int = 0,
    sparsities: Sequence[float] = (),
    reselect: Callable[[PackedMasks], PackedMasks] | None = None,
    precompute: Callable[[PackedMasks], None] | None = None,
    progress: Progress | None = None,
    allowed: Allowed | None = None,
) -> SearchResult:
    """Phase 1: one threshold per layer on the importance ranks, by NSGA-II.

    A threshold is the share of a layer's weights, least important first, that goes. The first population holds the
    classical allocations beside random thresholds around a common level.

    Args:
        evaluate: Masks to objectives (n, 2).
        layout: The layers.
        scores: float (n_weights,), higher = keep.
        starts: Classical allocations, each int (n_layers,), the number of weights to keep; judged exactly as they are.
        evaluations: Number of masks to judge, the starts included.
        population: Size of the population.
        seed: Fixes every draw.
        rungs: Densities that a layer may have (`ladder_of_densities`): what an evaluator works out for a layer at one
            of them serves all candidates. None for any density.
        level_switches: Share of the children that are varied by moving layers along the ladder at constant total
            density (`search.operators.switch_levels`).
        n_reselected: Members of the front, at its end, whose weights are chosen anew by `reselect`; the masks that come
            back are judged too, within the budget.
        sparsities: Among those members are the best ones beyond each of these.
        reselect: Masks to masks that keep as many weights of each layer.
        precompute: Told of the masks that have all layers on one rung, before anything is judged.
        progress: Called with each history row.
        allowed: Which masks may be published, see `Recorder`.

    Raises:
        ValueError: The budget does not even pay for the starts and one population.

    Source:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002, in pymoo, with its simulated
        binary crossover and polynomial mutation. The encoding is our reading of arXiv 2604.01076, which gives none.
        Level switches: Sieberling et al., "EvoPress", ICML 2025.
    """
    n_reselected = n_reselected if reselect is not None else 0
    if evaluations < len(starts) + population + n_reselected:
        anew = f" and {n_reselected} members chosen anew" if n_reselected else ""
        raise ValueError(
            f"Phase 1 needs at least {len(starts) + population + n_reselected} evaluations ({len(starts)} starting "
            f"allocations and a population of {population}{anew}), found {evaluations}; raise `evaluations` or lower "
            "`population`"
        )
    ranks = ranks_within_groups(scores, layout)
    ladder = None if rungs is None else ladder_of_densities(rungs)

    def masks_of(densities: np.ndarray) -> PackedMasks:
        """From the densities of layers (n, n_layers)."""
        counts = np.rint(densities * layout.sizes).astype(np.int64)
        return PackedMasks.pack_each((keep_top(ranks, row, layout) for row in counts), layout.n_weights)

    def decode(thresholds: np.ndarray) -> PackedMasks:
        densities = 1.0 - thresholds
        return masks_of(densities if ladder is None else ladder[operators.nearest_rungs(densities, ladder)])

    if ladder is not None and precompute is not None:
        precompute(masks_of(np.repeat(ladder[:, None], layout.n_groups, axis=1)))
    rng = np.random.default_rng(seed)
    recorder = Recorder(
        evaluate,
        layout.n_weights,
        budget=evaluations - n_reselected,
        stage="start",
        progress=progress,
        allowed=allowed,
    )
    first = [1.0 - np.asarray(counts) / layout.sizes for counts in starts]
    if first:
        recorder(masks_of(1.0 - np.array(first)))
        recorder.close_generation()
    recorder.stage = "phase1"
    for _ in range(max(population - len(starts), population // 4)):
        level = rng.uniform(0.1, 0.98)
        first.append(np.clip(level + 0.15 * rng.standard_normal(layout.n_groups), 0.0, 0.99))
    mutation: Mutation = PM(prob=1.0, prob_var=1.0 / layout.n_groups, eta=20)
    if ladder is not None and level_switches:
        mutation = _LevelSwitches(ladder, layout.sizes, level_switches, mutation)
    algorithm = NSGA2(pop_size=population, sampling=np.array(first), crossover=SBX(prob=0.9, eta=15), mutation=mutation)
    problem = PruningProblem(layout.n_groups, decode, recorder, bounds=(0.0, 1.0))
    run_algorithm(algorithm, problem, recorder, seed)
    if n_reselected and reselect is not None:
        recorder.budget, recorder.survival = evaluations, None
        recorder.stage = "reselected"
        recorder(reselect(recorder.front.thinned(n_reselected, sparsities).masks))
        recorder.close_generation()
    return recorder.result()


Cross = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
Vary = Callable[[Sequence[Genome], np.random.Generator], Sequence[Genome]]


def _packed_algorithm(
    name: str, population: int, first: list[Genome], cross: Cross, vary: Vary, crossover_probability: float
) -> Algorithm:
    """One of pymoo's algorithms on packed genomes.

    Args:
        name: `nsga2` or `moead`.
        population: Size of the population.
        first: The first population; the list is emptied when the algorithm takes it.
        cross: Words of two parents to those of a child.
        vary: Genomes to changed ones.
        crossover_probability: Probability that a child has two parents.

    Raises:
        ValueError: The algorithm is unknown.
    """
    if name == "nsga2":
        return _packed_nsga2(population, first, cross, vary, crossover_probability)
    if name == "moead":
        return ParallelMOEAD(
            ref_dirs=get_reference_directions("uniform", 2, n_partitions=population - 1),
            n_neighbors=max(2, min(20, population // 3)),
            sampling=_handing_over(first),
            crossover=_PackedCrossover(cross, crossover_probability),
            mutation=_PackedMutation(vary),
        )
    raise ValueError(f"expected an algorithm among {', '.join(ALGORITHMS)}, found '{name}'")


def _packed_nsga2(
    population: int, first: list[Genome], cross: Cross, vary: Vary, crossover_probability: float, **changed: Any
) -> NSGA2:
    """NSGA-II on packed genomes; arguments as for `_packed_algorithm`, and pymoo's own."""
    return NSGA2(
        pop_size=population,
        sampling=_handing_over(first),
        crossover=_PackedCrossover(cross, crossover_probability),
        mutation=_PackedMutation(vary),
        eliminate_duplicates=_PackedDuplicates(),
        **changed,
    )


def _handing_over(first: list[Genome]) -> Callable[..., Population]:
    """pymoo's sampling of a given first population, which empties the list."""

    # pymoo would hold an array that it is given, and with it all genomes that die out, until the end.
    def sample(*args: Any, **kwargs: Any) -> Population:
        x = _individuals(first)
        first.clear()
        return Population.new("X", x)

    return sample


def guided_algorithm(
    name: str,
    corridor: Corridor,
    rankings: Sequence[operators.Ranking],
    starts: PackedMasks,
    *,
    population: int,
    softness: float,
    first_rate: float,
    crossover_probability: float,
    rng: np.random.Generator,
    moving: operators.MovingRanking | None = None,
    adaptive: bool = True,
) -> tuple[Algorithm, operators.AdaptiveVariation]:
    """The algorithm of Phase 2, and the variation to be told of its successes; arguments as for `search_corridor`.

    Args:
        name: `nsga2` or `moead`.
        corridor: What is searched.
        rankings: Of each guide, from `Corridor.rank`.
        starts: Masks of the first population; samples fill it up.
        population: Size of the population.
        softness: Of samples and moves.
        first_rate: Of moves.
        crossover_probability: Probability that a child has two parents.
        rng: Draws the samples.
        moving: A further ranking for moves, which depends on the mask that is varied.
        adaptive: Whether moves learn from their success.
    """
    layers = corridor.layers
    guides: list[operators.Ranking | operators.MovingRanking] = [*rankings]
    guides += [] if moving is None else [moving]
    variation = operators.AdaptiveVariation(layers, guides, softness, first_rate, adaptive=adaptive)
    members = [Genome(row) for row in corridor.restrict(starts).words]
    densities = np.linspace(0, 1, max(population - len(members), 1) + 2)[1:-1].tolist()
    samples = operators.sample_bernoulli(layers, rankings[0], corridor.lower, densities, softness, rng)
    algorithm = _packed_algorithm(
        name,
        population,
        _sparsest_first([*members, *map(Genome, samples)][:population]),
        lambda a, b, random: operators.one_point_crossover(a, b, layers, random),
        variation.vary,
        crossover_probability,
    )
    return algorithm, variation


def _sparsest_first(genomes: Iterable[Genome]) -> list[Genome]:
    """In the order of MOEA/D's weight vectors, so that each member starts at its own trade-off."""
    return sorted(genomes, key=lambda genome: int(np.bitwise_count(genome.words).sum()))


def blind_algorithm(
    name: str, n_weights: int, *, population: int, flip_rate: float, rng: np.random.Generator
) -> Algorithm:
    """The algorithm of the flat search; arguments as for `search_flat`."""

    def flip(genomes: Sequence[Genome], random: np.random.Generator) -> list[Genome]:
        return [_flipped(genome, n_weights, flip_rate, random) for genome in genomes]

    densities = np.linspace(0.02, 1.0, population).tolist()
    first = [Genome(words) for words in operators.sample_blind(n_weights, densities, rng)]
    return _packed_algorithm(name, population, first, operators.uniform_crossover, flip, 0.9)


def sparse_algorithm(
    name: str,
    layout: WeightUnits,
    recorder: Recorder,
    *,
    population: int,
    least_share: float,
    score_share: float,
    rng: np.random.Generator,
) -> Algorithm:
    """SparseEA or MSKEA, once it has judged the groups of weights and its first population; both are paid for.

    Its population at the start are the best of the two together. Children always have two parents, and survive as in
    NSGA-II; MSKEA's authors thin the last rank one by one, as SPEA2 does, for which pymoo's pruning by the distances to
    the two nearest neighbours stands in.

    Args:
        name: `sparse_ea` or `mskea`.
        layout: The layers.
        recorder: Judges masks.
        population: Size of the population.
        least_share: The smallest step, see `sparse.TournamentVariation`.
        score_share: Share of the budget that judges groups.
        rng: Draws the first population and, for MSKEA, what leads each generation.

    Raises:
        ValueError: The budget does not pay for groups and a population.
    """
    n_groups = sparse.n_groups_within(recorder.budget, score_share)
    if recorder.budget < n_groups + population:
        raise ValueError(
            f"{name} needs at least {n_groups + population} evaluations ({n_groups} groups of weights and a population "
            f"of {population}), found {recorder.budget}; raise `evaluations`, or lower `population` or `score_share`"
        )
    bounds = sparse.cut_into_groups(layout, n_groups)
    lacking = sparse.masks_without_each(bounds)
    answers, _ = recorder(lacking)
    recorder.close_generation()
    _, fronts = NonDominatedSorting().do(answers, return_rank=True)
    costs = sparse.costs_of_weights(bounds, fronts)
    drawn = PackedMasks.of_genomes(map(Genome, sparse.sample_by_tournaments(costs, population, rng)), layout.n_weights)
    objectives, _ = recorder(drawn)
    recorder.close_generation()

    survival = RankAndCrowding(crowding_func="2nn" if name == "mskea" else "cd")
    genomes = [Genome(row) for masks in (lacking, drawn) for row in masks.words]
    pool = Population.new("X", _individuals(genomes), "F", np.concatenate([answers, objectives]))
    problem = PruningProblem.packed(layout.n_weights, recorder)
    best = survival.do(problem, _PackedDuplicates().do(pool), n_survive=population, random_state=rng)
    first = [individual.X[0] for individual in best]
    if name == "sparse_ea":
        simple = sparse.TournamentVariation(costs, least_share)
        return _packed_nsga2(population, first, simple.cross, simple.vary, 1.0, survival=survival)
    staged = sparse.StagedVariation(costs, least_share)

    def learn(algorithm: Algorithm) -> None:
        front = [individual.X[0] for individual in algorithm.pop if individual.get("rank") == 0]
        staged.learn(front, recorder.evaluations / recorder.budget, rng)

    return _packed_nsga2(population, first, staged.cross, staged.vary, 1.0, survival=survival, callback=learn)


def _flipped(genome: Genome, n_weights: int, rate: float, rng: np.random.Generator) -> Genome:
    words = genome.edit()
    operators.flip_bits(words, n_weights, rate, rng)
    return Genome(words)


def search_corridor(
    evaluate: Evaluate,
    corridors: Corridor | Sequence[Corridor],
    guides: Sequence[np.ndarray],
    before: SearchResult,
    *,
    algorithm: str,
    evaluations: int,
    population: int,
    softness: float,
    first_rate: float,
    crossover_probability: float,
    seed: int,
    adaptive: bool = True,
    moving_guide: Callable[[Corridor], operators.MovingRanking] | None = None,
    progress: Progress | None = None,
    allowed: Allowed | None = None,
) -> SearchResult:
    """Phase 2: one bit per corridor weight, by NSGA-II or MOEA/D, merged with Phase 1's front.

    The first population holds Phase 1's members, moved into the corridor where they lie outside, and Bernoulli samples
    along the first guide at densities spread over the corridor. Several corridors have a population each, and every
    next generation goes to the corridor that is expected to add most hypervolume.

    Args:
        evaluate: Masks to objectives (n, 2).
        corridors: What is searched, one or several.
        guides: Importance scores, each float (n_weights,), that moves follow; the first also shapes the samples.
        before: Phase 1.
        algorithm: `nsga2` or `moead`.
        evaluations: Number of masks to judge beyond those of Phase 1.
        population: Size of the population, of all corridors together.
        softness: Width of the step in the sampling probabilities and noise of the moves, in corridor coordinates.
        first_rate: Share of the corridor's bits that a move changes at first.
        crossover_probability: Probability that a child mixes two parents before it is varied.
        seed: Fixes every draw.
        adaptive: Whether the choice and the size of moves learn from their success.
        moving_guide: Makes a further guide of a corridor, one that depends on the mask that is varied.
        progress: Called with each history row.
        allowed: Which masks may be published, see `Recorder`.

    Raises:
        ValueError: The algorithm is unknown, there is no guide, or there is no corridor.

    Source:
        NSGA-II: Deb et al., 2002. MOEA/D: Zhang and Li, 2007, with Tchebycheff decomposition; both in pymoo.
    """
    corridors = [corridors] if isinstance(corridors, Corridor) else list(corridors)
    if not guides or not corridors:
        raise ValueError("Phase 2 needs at least one importance score as guide and one corridor")
    n_weights = corridors[0].layout.n_weights
    recorder = Recorder(
        evaluate,
        n_weights,
        budget=evaluations,
        stage="phase2",
        before=before,
        progress=progress,
        allowed=allowed,
    )
    rng = np.random.default_rng(seed)
    each = population if len(corridors) == 1 else max(SMALLEST_POPULATION, population // len(corridors))
    runs = []
    for corridor in corridors:
        members = before.front if len(corridors) == 1 else _within(before.front, corridor)
        chosen, variation = guided_algorithm(
            algorithm,
            corridor,
            [corridor.rank(scores) for scores in guides],
            members.thinned(max(2, each * 3 // 4)).masks,
            population=each,
            softness=softness,
            first_rate=first_rate,
            crossover_probability=crossover_probability,
            rng=rng,
            moving=None if moving_guide is None else moving_guide(corridor),
            adaptive=adaptive,
        )
        runs.append(_Run(chosen, PruningProblem.packed(n_weights, recorder, variation.reward), recorder, seed))
    _run_by_gain(runs, recorder)
    return recorder.result()


def _within(front: Front, corridor: Corridor) -> Front:
    """The members whose density a corridor can have."""
    sparsest, densest = PackedMasks(np.stack([corridor.lower, corridor.upper]), corridor.layout.n_weights).density
    return front.select(np.flatnonzero((front.density >= sparsest) & (front.density <= densest)))


def search_flat(
    evaluate: Evaluate,
    layout: WeightUnits,
    *,
    algorithm: str,
    evaluations: int,
    population: int,
    flip_rate: float,
    seed: int,
    score_share: float = 0.05,
    progress: Progress | None = None,
    allowed: Allowed | None = None,
) -> SearchResult:
    """The single-phase baselines, on whole masks and without importance scores.

    NSGA-II or MOEA/D with random masks at first, uniform crossover and bit flips; or SparseEA or MSKEA, which start
    with scores of their own and follow these.

    Args:
        evaluate: Masks to objectives (n, 2).
        layout: The layers.
        algorithm: `nsga2`, `moead`, `sparse_ea` or `mskea`.
        evaluations: Number of masks to judge, those for scores included.
        population: Size of the population.
        flip_rate: Probability of each bit to flip in a mutation; of `sparse_ea` and `mskea` the smallest step, as a
            share of the kept weights.
        seed: Fixes every draw.
        score_share: Share of the evaluations that `sparse_ea` and `mskea` judge groups of weights with.
        progress: Called with each history row.
        allowed: Which masks may be published, see `Recorder`.

    Raises:
        ValueError: The algorithm is unknown, or the budget pays for scores but no population.

    Source:
        See `search.sparse_ea` for SparseEA and MSKEA, and for how they are adapted to networks.
    """
    known = (*ALGORITHMS, *SPARSE_ALGORITHMS)
    if algorithm not in known:
        raise ValueError(f"expected an algorithm among {', '.join(known)}, found '{algorithm}'")
    recorder = Recorder(
        evaluate, layout.n_weights, budget=evaluations, stage="flat", progress=progress, allowed=allowed
    )
    rng = np.random.default_rng(seed)
    if algorithm in SPARSE_ALGORITHMS:
        chosen = sparse_algorithm(
            algorithm,
            layout,
            recorder,
            population=population,
            least_share=flip_rate,
            score_share=score_share,
            rng=rng,
        )
    else:
        chosen = blind_algorithm(algorithm, layout.n_weights, population=population, flip_rate=flip_rate, rng=rng)
    run_algorithm(chosen, PruningProblem.packed(layout.n_weights, recorder), recorder, seed)
    return recorder.result()


def sweep_allocation(
    evaluate: Evaluate,
    layout: WeightUnits,
    scores: np.ndarray,
    counts: Sequence[np.ndarray],
    *,
    progress: Progress | None = None,
    allowed: Allowed | None = None,
) -> SearchResult:
    """The baselines without a search: one score and one allocation rule at a ladder of densities.

    Args:
        evaluate: Masks to objectives (n, 2).
        layout: The layers.
        scores: float (n_weights,), higher = keep.
        counts: Numbers of weights to keep, each int (n_layers,), one per rung of the ladder.
        progress: Called with each history row.
        allowed: Which masks may be published, see `Recorder`.
    """
    ranks = ranks_within_groups(scores, layout)
    recorder = Recorder(
        evaluate, layout.n_weights, budget=len(counts), stage="allocation", progress=progress, allowed=allowed
    )
    for row in counts:
        recorder(PackedMasks.pack(keep_top(ranks, row, layout)))
        recorder.close_generation()
    return recorder.result()


def judge_again(front: Front, evaluate: Evaluate) -> Front:
    """The same masks judged by another evaluator, without those that others now dominate.

    Args:
        front: A front, perhaps judged in reduced precision.
        evaluate: Masks to objectives (n, 2), in full precision.
    """
    judged = Front(front.masks, evaluate(front.masks), front.stages)
    return Front.empty(front.masks.n_units).merge(judged)
