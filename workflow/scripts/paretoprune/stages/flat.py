"""The flat baselines: searches over whole masks in one phase."""

from paretoprune.search.flat import search_flat
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult
from paretoprune.settings import Flat
from paretoprune.stages.candidates import Setup


def find_flat(setup: Setup, settings: Flat, effort: Effort) -> SearchResult:
    """Search whole masks in one phase.

    Args:
        setup: What is pruned, and how candidates are evaluated.
        settings: The algorithm and the size of its steps.
        effort: Evaluations, population and seed.
    """
    with setup.evaluator() as evaluator:
        return search_flat(setup.problem(evaluator), settings, effort)
