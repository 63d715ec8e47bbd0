"""The two-phase method by itself: from a loss of bits and prior importance to a front, with or without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from paretoprune.masks.units import Units
from paretoprune.search.corridor import Corridor, anchors_between, choose_anchors, corridors_of
from paretoprune.search.phase2 import search_corridor
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.recorder import SearchResult
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Anchors, Budget, Phase1, Phase2

# Two starts at each density beside the two ends leave most of a budget of hundreds to the search.
START_DENSITIES = (0.6, 0.35, 0.2, 0.1, 0.05, 0.02)


def search(
    problem: Problem,
    scores: np.ndarray | Mapping[str, np.ndarray],
    effort: Effort,
    *,
    phase1: Phase1 | None = None,
    anchors: Anchors | None = None,
    phase2: Phase2 | None = None,
) -> SearchResult:
    """Search a large binary problem along prior importance, in two phases.

    Phase 1 looks for one threshold per group on the first score. Two members of its front, the anchors, bound a
    corridor of masks, in which Phase 2 decides about every unit.

    Phase 1 starts from the mask that keeps everything, the one that keeps nothing, and, at each of a ladder of
    densities, the same density in every group and the best units of all groups together.

    The tolerances of the anchors are shares of the way from the lowest to the highest loss on Phase 1's front. For a
    trained network these would be the losses of keeping everything and of guessing. Elsewhere keeping everything may be
    far from the best, as with features that are mostly noise: an anchor that is as good as that would shut the best
    masks out of the corridor. What keeps nothing is the cheapest mask there is, so its loss is on the front, unless
    `problem.is_feasible` forbids it.

    Args:
        problem: Units in groups, a loss to measure, one or two costs.
        scores: float (n_units,), higher = keep, or several of these by name. The first shapes Phase 1 and the samples
            of Phase 2, and moves follow all of them. Only their order within a group counts, but for the starts.
        effort: Number of masks to evaluate in both phases together, the starts included.
        phase1: `share` is Phase 1's part of the evaluations, 1 for no Phase 2; `starts` and `n_reselected` mean nothing
            here. None for the defaults with `start_densities` from `START_DENSITIES`.
        anchors: Tolerances, and how many corridors; none of them searches all masks. None for the defaults.
        phase2: Algorithm and moves; `guides` means nothing here. None for the defaults.

    Returns:
        Every non-dominated mask that was evaluated, cheapest first, and the history of both phases.

    Raises:
        ValueError: Scores are missing, of another shape or not finite; Phase 1's budget does not pay for its starts and
            a population, or finds no mask that is allowed; or the algorithm is unknown.

    Source:
        arXiv 2604.01076, which calls it a paradigm for large binary problems; see `search.thresholds` and
        `search.phase2` for what is ours.
    """
    guides = _guides(scores, problem.units.n_units)
    phase1 = phase1 or Phase1(start_densities=START_DENSITIES)
    anchors, phase2 = anchors or Anchors(), phase2 or Phase2()
    budget = Budget(effort.evaluations, phase1.share)
    starts = starting_counts(guides[0], problem.units, phase1.start_densities)
    found = search_thresholds(problem, guides[0], starts, phase1, replace(effort, evaluations=budget.phase1))
    left = budget.phase2(found.history[-1]["evaluations"])
    if not left:
        return found
    front = found.front
    light, heavy = choose_anchors(
        front,
        front.error.min(initial=np.inf),
        front.error.max(initial=-np.inf),
        light_tolerance=anchors.light_tolerance,
        heavy_tolerance=anchors.heavy_tolerance,
    )
    chosen = anchors_between(front, light, heavy, anchors.corridors)
    corridors = (
        corridors_of(front.masks.select(chosen), problem.units)
        if anchors.corridors
        else [Corridor.everything(problem.units)]
    )
    return search_corridor(problem, corridors, guides, found, phase2, replace(effort, evaluations=left))


def starting_counts(scores: np.ndarray, units: Units, densities: Sequence[float]) -> list[np.ndarray]:
    """Where Phase 1 starts: everything, nothing, and a uniform and a global allocation at each density.

    Args:
        scores: float (n_units,), higher = keep.
        units: The groups.
        densities: Shares of all units to keep.

    Returns:
        Numbers of units to keep, each int64 (n_groups,).
    """
    order = np.argsort(-scores, kind="stable")
    counts = [units.sizes, np.zeros_like(units.sizes)]
    for density in densities:
        best = order[: round(density * units.n_units)]
        uniform = np.rint(density * units.sizes).astype(np.int64)
        counts += [uniform, np.bincount(units.group_of[best], minlength=units.n_groups)]
    return counts


def _guides(scores: np.ndarray | Mapping[str, np.ndarray], n_units: int) -> list[np.ndarray]:
    """The scores as arrays in their order, once they have been checked."""
    named = scores if isinstance(scores, Mapping) else {"importance": scores}
    if not named:
        raise ValueError("expected at least one importance score, found none; without any, use search_flat")
    for name, values in named.items():
        if np.shape(values) != (n_units,) or not np.isfinite(values).all():
            raise ValueError(
                f"expected a finite score '{name}' for each of {n_units} units, found shape {np.shape(values)} with "
                f"{int((~np.isfinite(values)).sum())} values that are not finite"
            )
    return [np.asarray(values) for values in named.values()]
