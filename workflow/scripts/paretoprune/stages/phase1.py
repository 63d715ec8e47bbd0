"""Phase 1: one threshold per layer, searched by NSGA-II from the classical allocations on."""

from collections.abc import Mapping, Sequence

import numpy as np

from paretoprune.evaluation.finishing import Finisher
from paretoprune.fronts import Front
from paretoprune.importance.allocation import starting_allocations
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Phase1
from paretoprune.stages.candidates import Setup


def find_thresholds(
    setup: Setup,
    scores: Mapping[str, np.ndarray],
    settings: Phase1,
    effort: Effort,
    *,
    sparsities: Sequence[float] = (),
) -> SearchResult:
    """Search one threshold per layer.

    Args:
        setup: What is pruned, and how candidates are evaluated.
        scores: By name, each float32 (n_weights,): first the one that thresholds cut, then those that the starting
            allocations follow.
        settings: The settings of Phase 1.
        effort: Evaluations of this phase, population and seed.
        sparsities: The best member beyond each of these is among those whose weights are chosen anew.
    """
    starts = starting_allocations(settings.starts, settings.start_densities, scores, setup.task.units)
    with setup.evaluator() as evaluator:
        finisher = Finisher(setup.candidate_task, setup.searching.search_evaluating, setup.compute, evaluator.refit)

        def reselect(front: Front) -> PackedMasks:
            return finisher.reselect(front.thinned(settings.n_reselected, sparsities).masks)

        return search_thresholds(
            setup.problem(evaluator),
            next(iter(scores.values())),
            starts,
            settings,
            effort,
            reselect=reselect,
            precompute=evaluator.precompute,
        )
