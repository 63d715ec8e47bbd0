"""Phase 1: thresholds, from the classical allocations to the best of what NSGA-II makes of them."""

from collections.abc import Mapping, Sequence

import numpy as np

from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front
from paretoprune.importance.allocation import starting_allocations
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.problem import Effort, Progress
from paretoprune.search.recorder import SearchResult
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Compute, Phase1, Searching
from paretoprune.stages.candidates import candidate_evaluator, candidate_judging, candidate_task, make_problem


def find_thresholds(
    task: Task,
    scores: Mapping[str, np.ndarray],
    searching: Searching,
    settings: Phase1,
    effort: Effort,
    compute: Compute,
    *,
    sparsities: Sequence[float] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Search one threshold per layer.

    Args:
        task: What is pruned.
        scores: By name, each float32 (n_weights,): the first is what thresholds cut, and those that the starting
            allocations follow.
        searching: How candidates are judged.
        settings: Of Phase 1.
        effort: Evaluations of this phase, population and seed.
        compute: What to compute with.
        sparsities: Among the members that are chosen anew are the best ones beyond each of these.
        progress: Called with each new history row.
    """
    starts = starting_allocations(settings.starts, settings.start_densities, scores, task.units)
    with candidate_evaluator(task, searching, compute) as evaluate:
        judging = candidate_judging(searching)
        finisher = Finisher(candidate_task(task, searching), judging, compute, evaluate.refit)

        def choose_anew(front: Front) -> PackedMasks:
            return finisher.reselect(front.thinned(settings.n_reselected, sparsities).masks)

        return search_thresholds(
            make_problem(task, evaluate, searching, progress),
            next(iter(scores.values())),
            starts,
            settings,
            effort,
            reselect=choose_anew,
            precompute=evaluate.precompute,
        )
