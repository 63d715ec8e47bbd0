"""Phase 1: a continuous search over one threshold per group."""

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
from paretoprune.search.levels import Ladder, nearest_rungs, rung_densities, switch_levels
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PruningProblem, run_algorithm
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.settings import Phase1

# Level switches of an individual at a time, at most, where groups may have any density.
MOST_SWITCHES = 4


class LevelSwitches(Mutation):
    """Moves some individuals between rungs at a constant total, and all others by another mutation.

    Args:
        ladder: The rungs.
        share: Probability of a level switch.
        fallback: The mutation of the other individuals.
        most: Level switches of an individual at a time, at most.
    """

    def __init__(self, ladder: Ladder, share: float, fallback: Mutation, most: int = 1) -> None:
        super().__init__(prob=1.0)
        self._ladder, self._share, self._fallback, self._most = ladder, share, fallback, most

    def _do(
        self, problem: PymooProblem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any
    ) -> np.ndarray:
        varied = self._fallback._do(problem, x.copy(), *args, random_state=random_state, **kwargs)
        for i in np.flatnonzero(random_state.random(len(x)) < self._share):
            levels = nearest_rungs(1.0 - x[i], self._ladder.densities)
            for _ in range(1 if self._most == 1 else random_state.integers(1, self._most + 1)):
                levels = switch_levels(levels, self._ladder.amounts, random_state)
            varied[i] = 1.0 - self._ladder.densities[levels]
        return varied


class _Decoder:
    """Decodes thresholds, or densities, to masks that keep the most important units of each group.

    Args:
        scores: float (n_units,), higher = keep.
        units: The groups.
        rungs: float (n_rungs,), the densities that a group may have; None for any.
    """

    def __init__(self, scores: np.ndarray, units: Units, rungs: np.ndarray | None) -> None:
        self._ranks, self._units, self._rungs = ranks_within_groups(scores, units), units, rungs

    def masks(self, densities: np.ndarray) -> PackedMasks:
        """Masks of the given densities (n, n_groups), rounded to whole numbers of units."""
        counts = np.rint(densities * self._units.sizes).astype(np.int64)
        rows = (keep_top(self._ranks, row, self._units) for row in counts)
        return PackedMasks.pack_each(rows, self._units.n_units)

    def __call__(self, thresholds: np.ndarray) -> PackedMasks:
        """Masks of thresholds (n, n_groups); with rungs, each density is moved to the nearest one."""
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
    ladder: Ladder | None = None,
) -> SearchResult:
    """Search one threshold per group on the importance ranks by NSGA-II.

    A threshold is the share of a group's units that is removed, the least important ones first. The first population
    holds the classical allocations, and random thresholds around a common level.

    Args:
        problem: What is searched.
        scores: float (n_units,), higher = keep.
        starts: Classical allocations, each int (n_groups,), the number of units to keep; evaluated first.
        settings: With `rungs`, groups have few different densities, so that an evaluator can reuse what it computed for
            a group. `level_switches` is the share of children that move between rungs, see
            `search.levels.switch_levels`. `n_reselected` masks come from `reselect`, within the budget.
        effort: Number of masks to evaluate, the starts included; population and seed.
        reselect: From the front of the search to at most `n_reselected` masks, which are evaluated at the end.
        precompute: Called before any evaluation with the masks in which all groups are on the same rung.
        ladder: What level switches keep constant, where groups may have any density; an individual then gets several
            at a time. None for the number of units, on the `rungs` of the settings.

    Raises:
        ValueError: The budget does not pay for the starts, one population and the reselected masks.

    Source:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002, in pymoo, with its simulated
        binary crossover and polynomial mutation; with three objectives NSGA-III, Deb and Jain, 2014. The encoding is
        our own, as arXiv 2604.01076 gives none. Level switches: Sieberling et al., "EvoPress", ICML 2025.
    """
    units, population = problem.units, effort.population
    # The search leaves this part of the budget for the end.
    n_reselected = settings.n_reselected if reselect is not None else 0
    needed = len(starts) + population + n_reselected
    if effort.evaluations < needed:
        reselected = f" and {n_reselected} members chosen anew" if n_reselected else ""
        raise ValueError(
            f"Phase 1 needs at least {needed} evaluations ({len(starts)} starting "
            f"allocations and a population of {population}{reselected}), found {effort.evaluations}; raise "
            "`evaluations` or lower `population`"
        )
    rungs = None if settings.rungs is None else rung_densities(settings.rungs)
    decode = _Decoder(scores, units, rungs)
    if rungs is not None and precompute is not None:
        on_rungs = decode.masks(np.repeat(rungs[:, None], units.n_groups, axis=1))
        precompute(on_rungs if problem.absent is None else on_rungs.without(problem.absent))
    recorder = Recorder(problem, budget=effort.evaluations - n_reselected, stage="start")
    first_population = [1.0 - np.asarray(counts) / units.sizes for counts in starts]
    if first_population:
        # As they are: `decode` itself would move them to rungs.
        recorder(decode.masks(1.0 - np.array(first_population)))
        recorder.close_generation()
    recorder.stage = "phase1"
    n_random = max(population - len(starts), population // 4)
    first_population += _random_thresholds(n_random, units.n_groups, np.random.default_rng(effort.seed))
    mutation: Mutation = PM(prob=1.0, prob_var=1.0 / units.n_groups, eta=20)
    if rungs is not None and settings.level_switches:
        mutation = LevelSwitches(Ladder.of_units(rungs, units.sizes), settings.level_switches, mutation)
    elif ladder is not None:
        mutation = LevelSwitches(ladder, settings.level_switches, mutation, MOST_SWITCHES)
    algorithm = _threshold_algorithm(population, np.array(first_population), mutation, len(problem.objectives))
    run_algorithm(algorithm, PruningProblem(units.n_groups, decode, recorder, bounds=(0.0, 1.0)), recorder, effort.seed)
    if n_reselected and reselect is not None:
        # No survival: reselected masks are evaluated in full, as no algorithm selects among them.
        recorder.budget, recorder.survival = effort.evaluations, None
        recorder.stage = "reselected"
        recorder(reselect(recorder.front))
        recorder.close_generation()
    return recorder.result()


def _random_thresholds(n: int, n_groups: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw thresholds around a common level, each float (n_groups,)."""
    thresholds = []
    for _ in range(n):
        level = rng.uniform(0.1, 0.98)
        thresholds.append(np.clip(level + 0.15 * rng.standard_normal(n_groups), 0.0, 0.99))
    return thresholds


def _threshold_algorithm(
    population: int, first_population: np.ndarray, mutation: Mutation, n_objectives: int
) -> Algorithm:
    """NSGA-II on thresholds, from an first population (n, n_groups); with more than two objectives NSGA-III."""
    common: dict[str, Any] = {
        "pop_size": population,
        "sampling": first_population,
        "crossover": SBX(prob=0.9, eta=15),
        "mutation": mutation,
    }
    if n_objectives > 2:
        return NSGA3(ref_dirs=reference_directions(n_objectives, population), **common)
    return NSGA2(**common)
