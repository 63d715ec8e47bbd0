"""Candidates of a search: how they are judged, what they cost, and which of them may be published."""

import numpy as np

from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import Units
from paretoprune.networks.costs import Priced, make_costs
from paretoprune.search.problem import Feasible, Problem, Progress
from paretoprune.settings import Compute, Searching
from paretoprune.stages.task import Task


def candidate_evaluator(task: Task, settings: Searching, compute: Compute) -> PopulationEvaluator:
    """Judges candidates: on `candidate_images` of the search images, after the repair of the search."""
    repair = settings.search_repair or settings.repair
    judged = task.search.first(settings.candidate_images)
    return PopulationEvaluator(
        task.network,
        task.units,
        judged.images,
        judged.labels,
        repair=repair,
        calibration_images=task.calibration,
        repair_images=settings.repair_images,
        statistics=task.statistics,
        damping=settings.damping,
        refine=settings.refine,
        objective=settings.objective,
        precision=settings.precision,
        batch_size=None if isinstance(settings.batch_size, str) else settings.batch_size,
        device=compute.device,
        workers=compute.workers,
        prefix_cache_mb=compute.prefix_cache_mb,
    )


def make_problem(
    task: Task, evaluate: PopulationEvaluator, settings: Searching, progress: Progress | None = None
) -> Problem:
    """The search problem of a task: an evaluator's loss, the costs, and which masks may be published."""
    priced = Priced(task.network, task.units, task.search.images[:1])
    feasible = no_group_is_empty(task.units) if settings.empty_layers == "forbid" else None
    return Problem(task.units, evaluate, make_costs(settings.costs, priced), feasible, progress)


def no_group_is_empty(units: Units) -> Feasible:
    """Allows masks that keep something of every group."""

    def is_feasible(masks: PackedMasks) -> np.ndarray:
        return np.asarray((units.n_kept(masks) > 0).all(axis=1))

    return is_feasible
