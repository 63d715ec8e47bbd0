"""Candidates of a search: how they are evaluated, what they cost, and which of them may be published."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.task import Task
from paretoprune.masks.packed import PackedMasks, pack_rows
from paretoprune.masks.units import Units, WeightUnits
from paretoprune.networks.costs import Priced, make_costs
from paretoprune.search.problem import Constraint, Evaluator, Problem, Progress
from paretoprune.settings import Compute, Searching


@dataclass(frozen=True)
class Setup:
    """What all stages of a search share.

    Attributes:
        task: What is pruned.
        searching: How candidates and finished networks are repaired and evaluated.
        compute: Device, precision and processes.
        progress: Called with each new history row.
    """

    task: Task
    searching: Searching
    compute: Compute
    progress: Progress | None = None

    @property
    def candidate_task(self) -> Task:
        """The task with the images that candidates are evaluated on: the first `candidate_images`, or all."""
        n = self.searching.candidate_images
        return replace(self.task, images=self.task.images[:n], labels=self.task.labels[:n])

    def evaluator(self) -> PopulationEvaluator:
        """Make the evaluator of candidates, with the repair `search_repair` if that is set."""
        return PopulationEvaluator(self.candidate_task, self.searching.search_evaluating, self.compute)

    def problem(self, evaluator: Evaluator) -> Problem:
        """Make the search problem: the evaluator's loss, the costs, and the constraint on masks."""
        task, searching = self.task, self.searching
        is_feasible = no_group_is_empty(task.units) if searching.empty_layers == "forbid" else None
        costs = make_costs(searching.costs, Priced(task.network, task.units, task.images[:1]))
        absent = zero_weights(task.network, task.units)
        return Problem(task.units, evaluator, costs, is_feasible, self.progress, absent=absent)


def zero_weights(network: nn.Module, units: WeightUnits) -> np.ndarray | None:
    """Find weights that are zero already, as in a network that was pruned before.

    No mask keeps them, so that a re-fit does not bring them back.

    Returns:
        uint64 (n_words,), packed like a mask, a bit is 1 if the weight is zero; None if there are none.
    """
    parameters = dict(network.named_parameters())
    zero = np.concatenate([(parameters[name] == 0).reshape(-1).cpu().numpy() for name in units.names])
    return pack_rows(zero[None])[0] if zero.any() else None


def no_group_is_empty(units: Units) -> Constraint:
    """The constraint that a mask keeps at least one unit of every group."""

    def is_feasible(masks: PackedMasks) -> np.ndarray:
        return np.asarray((units.n_kept(masks) > 0).all(axis=1))

    return is_feasible
