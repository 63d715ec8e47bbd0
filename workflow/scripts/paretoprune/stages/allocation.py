"""The allocation baselines: one score and one rule at several densities, without a search."""

import numpy as np

from paretoprune.evaluation.task import Task
from paretoprune.importance.allocation import allocate
from paretoprune.search.problem import Progress
from paretoprune.search.recorder import SearchResult
from paretoprune.search.sweep import sweep_allocation
from paretoprune.settings import Compute, Densities, Searching
from paretoprune.stages.candidates import candidate_evaluator, make_problem


def try_allocation(
    task: Task,
    scores: np.ndarray,
    rule: str,
    searching: Searching,
    settings: Densities,
    compute: Compute,
    *,
    progress: Progress | None = None,
) -> SearchResult:
    """Judge what one score and one rule keep.

    Args:
        task: What is pruned.
        scores: float32 (n_weights,), higher = keep.
        rule: A key of `importance.allocation.ALLOCATIONS`.
        searching: How candidates are judged.
        settings: The densities.
        compute: What to compute with.
        progress: Called with each new history row.
    """
    densities = np.geomspace(settings.lowest, settings.highest, settings.size)
    counts = [allocate(rule, scores, task.units, density) for density in densities]
    with candidate_evaluator(task, searching, compute) as evaluate:
        return sweep_allocation(make_problem(task, evaluate, searching, progress), scores, counts)
