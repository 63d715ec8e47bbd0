"""The allocation baselines: one score at several densities, without a search."""

from collections.abc import Sequence

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import keep_top, ranks_within_groups
from paretoprune.search.problem import Problem
from paretoprune.search.recorder import Recorder, SearchResult


def sweep_allocation(problem: Problem, scores: np.ndarray, counts: Sequence[np.ndarray]) -> SearchResult:
    """Evaluate the masks that keep the highest-scored units of each group, at several densities.

    Args:
        problem: What is evaluated.
        scores: float (n_units,), higher = keep.
        counts: One array for each density, int (n_groups,), the number of units to keep in each group.
    """
    ranks = ranks_within_groups(scores, problem.units)
    recorder = Recorder(problem, budget=len(counts), stage="allocation")
    for row in counts:
        recorder(PackedMasks.pack(keep_top(ranks, row, problem.units)))
        recorder.close_generation()
    return recorder.result()
