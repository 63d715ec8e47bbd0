"""Candidates of a search: how they are judged, what they cost, and which of them may be published."""

from dataclasses import replace

import numpy as np

from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.task import Task
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units
from paretoprune.networks.costs import Priced, make_costs
from paretoprune.search.problem import Evaluate, Feasible, Problem, Progress
from paretoprune.settings import Compute, Judging, Searching


def candidate_task(task: Task, settings: Searching) -> Task:
    """A task with the images that candidates are judged on: the first `candidate_images`, or all."""
    n = settings.candidate_images
    return replace(task, images=task.images[:n], labels=task.labels[:n])


def candidate_judging(settings: Searching) -> Judging:
    """How candidates are put right and judged: with the repair of the search, where it has one of its own."""
    return Judging.of(settings.plain() | {"repair": settings.search_repair or settings.repair})


def candidate_evaluator(task: Task, settings: Searching, compute: Compute) -> PopulationEvaluator:
    """Judges candidates."""
    return PopulationEvaluator(candidate_task(task, settings), candidate_judging(settings), compute)


def make_problem(task: Task, evaluate: Evaluate, settings: Searching, progress: Progress | None = None) -> Problem:
    """The search problem of a task: an evaluator's loss, the costs, and which masks may be published."""
    feasible = no_group_is_empty(task.units) if settings.empty_layers == "forbid" else None
    costs = make_costs(settings.costs, Priced(task.network, task.units, task.images[:1]))
    return Problem(task.units, evaluate, costs, feasible, progress)


def no_group_is_empty(units: Units) -> Feasible:
    """Allows masks that keep something of every group."""

    def is_feasible(masks: PackedMasks) -> np.ndarray:
        return np.asarray((units.n_kept(masks) > 0).all(axis=1))

    return is_feasible
