"""The baselines without a search: one score and one allocation rule at several densities."""

from collections.abc import Sequence

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import keep_top, ranks_within_groups
from paretoprune.search.problem import Problem
from paretoprune.search.recorder import Recorder, SearchResult


def sweep_allocation(problem: Problem, scores: np.ndarray, counts: Sequence[np.ndarray]) -> SearchResult:
    """Evaluate what one score keeps at several densities.

    Args:
        problem: Whose masks.
        scores: float (n_units,), higher = keep.
        counts: Numbers of units to keep, each int (n_groups,), one per density.
    """
    ranks = ranks_within_groups(scores, problem.units)
    recorder = Recorder(problem, budget=len(counts), stage="allocation")
    for row in counts:
        recorder(PackedMasks.pack(keep_top(ranks, row, problem.units)))
        recorder.close_generation()
    return recorder.result()
