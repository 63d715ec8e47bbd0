"""The flat baselines: whole masks in a single phase."""

from paretoprune.search.flat import search_flat
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult
from paretoprune.settings import Flat
from paretoprune.stages.candidates import Setup


def find_flat(setup: Setup, settings: Flat, effort: Effort) -> SearchResult:
    """Search whole masks.

    Args:
        setup: What is pruned, and how candidates are evaluated.
        settings: Algorithm and its steps.
        effort: Evaluations, population and seed.
    """
    with setup.evaluator() as evaluate:
        return search_flat(setup.problem(evaluate), settings, effort)
