"""Phase 1: one threshold per group, a continuous search."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.algorithm import Algorithm
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM

from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units, keep_top, ranks_within_groups
from paretoprune.search.algorithms import reference_directions
from paretoprune.search.levels import ladder_of_densities, nearest_rungs, switch_levels
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PruningProblem, run_algorithm
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.settings import Phase1


class LevelSwitches(Mutation):
    """Some individuals are moved along the ladder at constant total density, the others by another mutation.

    Args:
        rungs: float (n_rungs,), densities.
        sizes: int (n_groups,), units of each group.
        share: Probability of a level switch.
        otherwise: What else an individual is varied by.
    """

    def __init__(self, rungs: np.ndarray, sizes: np.ndarray, share: float, otherwise: Mutation) -> None:
        super().__init__(prob=1.0)
        self._rungs, self._share, self._otherwise = rungs, share, otherwise
        self._n_kept = np.rint(rungs * sizes[:, None]).astype(np.int64)

    def _do(
        self, problem: PymooProblem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any
    ) -> np.ndarray:
        varied = self._otherwise._do(problem, x.copy(), *args, random_state=random_state, **kwargs)
        for i in np.flatnonzero(random_state.random(len(x)) < self._share):
            levels = nearest_rungs(1.0 - x[i], self._rungs)
            varied[i] = 1.0 - self._rungs[switch_levels(levels, self._n_kept, random_state)]
        return varied


class _Decoder:
    """From densities of groups to masks that keep the most important units of each.

    Args:
        scores: float (n_units,), higher = keep.
        units: The groups.
        rungs: float (n_rungs,), the densities that a group may have; None for any.
    """

    def __init__(self, scores: np.ndarray, units: Units, rungs: np.ndarray | None) -> None:
        self._ranks, self._units, self._rungs = ranks_within_groups(scores, units), units, rungs

    def masks(self, densities: np.ndarray) -> PackedMasks:
        """Of exactly these densities, (n, n_groups), up to a whole number of units."""
        counts = np.rint(densities * self._units.sizes).astype(np.int64)
        rows = (keep_top(self._ranks, row, self._units) for row in counts)
        return PackedMasks.pack_each(rows, self._units.n_units)

    def __call__(self, thresholds: np.ndarray) -> PackedMasks:
        """Of thresholds (n, n_groups), each moved to the nearest rung where there are rungs."""
        densities = 1.0 - thresholds
        return self.masks(densities if self._rungs is None else self._rungs[nearest_rungs(densities, self._rungs)])


def search_thresholds(
    problem: Problem,
    scores: np.ndarray,
    starts: Sequence[np.ndarray],
    settings: Phase1,
    effort: Effort,
    *,
    reselect: Callable[[Front], PackedMasks] | None = None,
    precompute: Callable[[PackedMasks], None] | None = None,
) -> SearchResult:
    """Phase 1: one threshold per group on the importance ranks, by NSGA-II.

    A threshold is the share of a group's units, least important first, that goes. The first population holds the
    classical allocations beside random thresholds around a common level.

    Args:
        problem: What is searched.
        scores: float (n_units,), higher = keep.
        starts: Classical allocations, each int (n_groups,), the number of units to keep; evaluated exactly as they are.
        settings: `rungs`: what an evaluator works out for a group at one of them serves all candidates.
            `level_switches` moves groups along the ladder at constant total density (`search.levels.switch_levels`).
            `n_reselected` masks come from `reselect`, at the end and within the budget.
        effort: Number of masks to evaluate, the starts included.
        reselect: From the front to `n_reselected` masks at most, which are evaluated too.
        precompute: Told of the masks that have all groups on one rung, before anything is evaluated.

    Raises:
        ValueError: The budget does not even pay for the starts and one population.

    Source:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002, in pymoo, with its simulated
        binary crossover and polynomial mutation; with three objectives NSGA-III, Deb and Jain, 2014. The encoding is
        our reading of arXiv 2604.01076, which gives none. Level switches: Sieberling et al., "EvoPress", ICML 2025.
    """
    units, population = problem.units, effort.population
    n_reselected = settings.n_reselected if reselect is not None else 0
    needed = len(starts) + population + n_reselected
    if effort.evaluations < needed:
        anew = f" and {n_reselected} members chosen anew" if n_reselected else ""
        raise ValueError(
            f"Phase 1 needs at least {needed} evaluations ({len(starts)} starting "
            f"allocations and a population of {population}{anew}), found {effort.evaluations}; raise `evaluations` or "
            "lower `population`"
        )
    rungs = None if settings.rungs is None else ladder_of_densities(settings.rungs)
    decode = _Decoder(scores, units, rungs)
    if rungs is not None and precompute is not None:
        on_rungs = decode.masks(np.repeat(rungs[:, None], units.n_groups, axis=1))
        precompute(on_rungs if problem.absent is None else on_rungs.without(problem.absent))
    recorder = Recorder(problem, budget=effort.evaluations - n_reselected, stage="start")
    first = [1.0 - np.asarray(counts) / units.sizes for counts in starts]
    if first:
        recorder(decode.masks(1.0 - np.array(first)))
        recorder.close_generation()
    recorder.stage = "phase1"
    n_random = max(population - len(starts), population // 4)
    first += _random_thresholds(n_random, units.n_groups, np.random.default_rng(effort.seed))
    mutation: Mutation = PM(prob=1.0, prob_var=1.0 / units.n_groups, eta=20)
    if rungs is not None and settings.level_switches:
        mutation = LevelSwitches(rungs, units.sizes, settings.level_switches, mutation)
    algorithm = _algorithm(population, np.array(first), mutation, len(problem.objectives))
    run_algorithm(algorithm, PruningProblem(units.n_groups, decode, recorder, bounds=(0.0, 1.0)), recorder, effort.seed)
    if n_reselected and reselect is not None:
        recorder.budget, recorder.survival = effort.evaluations, None
        recorder.stage = "reselected"
        recorder(reselect(recorder.front))
        recorder.close_generation()
    return recorder.result()


def _random_thresholds(n: int, n_groups: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Thresholds around a common level, each float (n_groups,)."""
    found = []
    for _ in range(n):
        level = rng.uniform(0.1, 0.98)
        found.append(np.clip(level + 0.15 * rng.standard_normal(n_groups), 0.0, 0.99))
    return found


def _algorithm(population: int, first: np.ndarray, mutation: Mutation, n_objectives: int) -> Algorithm:
    """NSGA-II on thresholds, NSGA-III where there are more than two objectives."""
    common: dict[str, Any] = {
        "pop_size": population,
        "sampling": first,
        "crossover": SBX(prob=0.9, eta=15),
        "mutation": mutation,
    }
    if n_objectives > 2:
        return NSGA3(ref_dirs=reference_directions(n_objectives, population), **common)
    return NSGA2(**common)
