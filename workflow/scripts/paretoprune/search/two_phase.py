"""The two-phase method by itself: from a loss of masks and importance scores to a front, with or without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from paretoprune.masks.units import Units
from paretoprune.search.corridor import Corridor, anchors_between, choose_anchors, corridors_of
from paretoprune.search.levels import Ladder
from paretoprune.search.phase2 import search_corridor
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.recorder import SearchResult
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Anchors, Budget, Phase1, Phase2

# With two starts at each density and the two ends, that is 14 evaluations: few enough for a budget of hundreds.
START_DENSITIES = (0.6, 0.35, 0.2, 0.1, 0.05, 0.02)


def search(
    problem: Problem,
    scores: np.ndarray | Mapping[str, np.ndarray],
    effort: Effort,
    *,
    phase1: Phase1 | None = None,
    anchors: Anchors | None = None,
    phase2: Phase2 | None = None,
    starts: Sequence[np.ndarray] | None = None,
    ladder: Ladder | None = None,
) -> SearchResult:
    """Search a large binary problem along importance that is known beforehand, in two phases.

    Phase 1 searches one threshold per group on the first score. Two members of its front, the anchors, are the ends of
    a corridor of masks. Phase 2 searches one bit per unit of the corridor.

    Phase 1 starts from the mask that keeps everything and the one that keeps nothing. At each of several densities it
    also starts from that density in every group, and from the best units of all groups together.

    The tolerances of the anchors are shares of the way from the lowest to the highest loss on Phase 1's front. With a
    trained network these would be the losses of keeping everything and of guessing. With other problems, keeping
    everything may be far from the best, for instance if most features are noise. If tolerances started there, the
    corridor would not contain the best masks. The highest loss is that of keeping nothing, which is always on the front
    as the cheapest mask, unless `problem.is_feasible` forbids it.

    Args:
        problem: Units in groups, a loss to measure, one or two costs.
        scores: float (n_units,), higher = keep, or several of these by name. Phase 1 and the samples of Phase 2 follow
            the first one, moves follow all of them. Only their order within a group matters, except for the starts.
        effort: Number of masks to evaluate in both phases together, the starts included; population and seed.
        phase1: `share` is Phase 1's part of the evaluations, 1 for no Phase 2. `starts` and `n_reselected` are not
            used. None for the defaults with `start_densities` from `START_DENSITIES`.
        anchors: Tolerances and the number of corridors; with 0 corridors Phase 2 searches all masks. None for the
            defaults.
        phase2: Algorithm and moves; `guides` is not used. None for the defaults.
        starts: The masks that Phase 1 starts from, as numbers of units to keep, each int (n_groups,); None for those
            above.
        ladder: What level switches keep constant in Phase 1, see `search.thresholds`; None for none of them.

    Returns:
        All evaluated masks that no other one dominates, cheapest first, and the history of both phases.

    Raises:
        ValueError: Scores are missing, of another shape or not finite; Phase 1's budget does not pay for its starts and
            a population, or finds no feasible mask; or the algorithm is unknown.

    Source:
        arXiv 2604.01076, which proposes it for large binary problems; see `search.thresholds` and `search.phase2` for
        what is our own.
    """
    guides = _guides(scores, problem.units.n_units)
    phase1 = phase1 or Phase1(start_densities=START_DENSITIES)
    anchors, phase2 = anchors or Anchors(), phase2 or Phase2()
    budget = Budget(effort.evaluations, phase1.share)
    if starts is None:
        starts = starting_counts(guides[0], problem.units, phase1.start_densities)
    coarse = search_thresholds(
        problem, guides[0], starts, phase1, replace(effort, evaluations=budget.phase1), ladder=ladder
    )
    remaining = budget.phase2(coarse.history[-1]["evaluations"])
    if not remaining:
        return coarse
    front = coarse.front
    light, heavy = choose_anchors(
        front,
        front.error.min(initial=np.inf),
        front.error.max(initial=-np.inf),
        light_tolerance=anchors.light_tolerance,
        heavy_tolerance=anchors.heavy_tolerance,
    )
    members = anchors_between(front, light, heavy, anchors.corridors)
    corridors = (
        corridors_of(front.masks.select(members), problem.units)
        if anchors.corridors
        else [Corridor.everything(problem.units)]
    )
    return search_corridor(problem, corridors, guides, coarse, phase2, replace(effort, evaluations=remaining))


def starting_counts(scores: np.ndarray, units: Units, densities: Sequence[float]) -> list[np.ndarray]:
    """The starts of Phase 1: everything, nothing, and a uniform and a global allocation at each density.

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
    """Check the scores, and return them as arrays in their order."""
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
