"""The allocation baselines: one score and one allocation rule at several densities, without a search."""

import numpy as np

from paretoprune.importance.allocation import allocate
from paretoprune.search.recorder import SearchResult
from paretoprune.search.sweep import sweep_allocation
from paretoprune.settings import Densities
from paretoprune.stages.candidates import Setup


def try_allocation(setup: Setup, scores: np.ndarray, rule: str, settings: Densities) -> SearchResult:
    """Evaluate the masks of one score and one allocation rule at several densities.

    Args:
        setup: What is pruned, and how candidates are evaluated.
        scores: float32 (n_weights,), higher = keep.
        rule: A key of `importance.allocation.ALLOCATIONS`.
        settings: The densities.
    """
    densities = np.geomspace(settings.lowest, settings.highest, settings.size)
    counts = [allocate(rule, scores, setup.task.units, density) for density in densities]
    with setup.evaluator() as evaluator:
        return sweep_allocation(setup.problem(evaluator), scores, counts)
