"""Phase 1: thresholds, from the classical allocations to the best of what NSGA-II makes of them."""

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
        scores: By name, each float32 (n_weights,): the first is what thresholds cut, and those that the starting
            allocations follow.
        settings: Of Phase 1.
        effort: Evaluations of this phase, population and seed.
        sparsities: Among the members that are chosen anew are the best ones beyond each of these.
    """
    starts = starting_allocations(settings.starts, settings.start_densities, scores, setup.task.units)
    with setup.evaluator() as evaluate:
        finisher = Finisher(setup.candidate_task, setup.searching.search_evaluating, setup.compute, evaluate.refit)

        def choose_anew(front: Front) -> PackedMasks:
            return finisher.reselect(front.thinned(settings.n_reselected, sparsities).masks)

        return search_thresholds(
            setup.problem(evaluate),
            next(iter(scores.values())),
            starts,
            settings,
            effort,
            reselect=choose_anew,
            precompute=evaluate.precompute,
        )
