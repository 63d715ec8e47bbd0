"""The flat baselines: whole masks in a single phase."""

from paretoprune.evaluation.task import Task
from paretoprune.search.flat import search_flat
from paretoprune.search.problem import Effort, Progress
from paretoprune.search.recorder import SearchResult
from paretoprune.settings import Compute, Flat, Searching
from paretoprune.stages.candidates import candidate_evaluator, make_problem


def find_flat(
    task: Task,
    searching: Searching,
    settings: Flat,
    effort: Effort,
    compute: Compute,
    *,
    progress: Progress | None = None,
) -> SearchResult:
    """Search whole masks.

    Args:
        task: What is pruned.
        searching: How candidates are judged.
        settings: Algorithm and its steps.
        effort: Evaluations, population and seed.
        compute: What to compute with.
        progress: Called with each new history row.
    """
    with candidate_evaluator(task, searching, compute) as evaluate:
        return search_flat(make_problem(task, evaluate, searching, progress), settings, effort)
