"""The recorder: evaluates every mask of a search once, and keeps the front of all of them and the history."""

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.problem import BoundedEvaluator, Problem
from paretoprune.search.survival import Survival

HISTORY_COLUMNS = ("generation", "evaluations", "seconds", "hypervolume", "stage")


@dataclass
class SearchResult:
    """The result of a search.

    Attributes:
        front: All evaluated networks that no other one dominates, cheapest first.
        history: One row per generation with the keys `HISTORY_COLUMNS`; evaluations and seconds are cumulative.
    """

    front: Front
    history: list[dict[str, Any]]


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a history written with the columns `HISTORY_COLUMNS`."""
    types = {"generation": int, "evaluations": int, "seconds": float, "hypervolume": float, "stage": str}
    with Path(path).open(newline="", encoding="utf-8") as handle:
        return [{key: types[key](row[key]) for key in HISTORY_COLUMNS} for row in csv.DictReader(handle)]


@dataclass(frozen=True)
class _Evaluation:
    """Objectives (n_objectives,) of a mask; unless complete, the loss is a lower bound."""

    objectives: np.ndarray
    complete: bool
    feasible: bool = True


@dataclass(frozen=True)
class _Batch:
    """Masks that are evaluated together, their fingerprints, and their costs (n_masks, n_costs)."""

    masks: PackedMasks
    keys: list[bytes]
    costs: np.ndarray


class BudgetSpentError(Exception):
    """More masks were to be evaluated than the budget of a search allows."""


class Recorder:
    """Evaluates masks, each distinct one once, and remembers the non-dominated ones.

    Args:
        problem: What is searched.
        budget: Largest number of masks to evaluate.
        stage: Recorded with each mask that is evaluated from now on; may be changed.
        previous: A search that this one continues. Its front is the first front, and its history comes first.

    Attributes:
        survival: How the algorithm will select among the masks that are evaluated next. Masks that it drops in any case
            need not be evaluated in full. None to evaluate all of them in full.

    Raises:
        ValueError: The previous search has other objectives.
    """

    def __init__(self, problem: Problem, *, budget: int, stage: str, previous: SearchResult | None = None) -> None:
        if previous and previous.front.names != problem.objectives:
            raise ValueError(
                f"expected to continue a search of {', '.join(problem.objectives)}, found one of "
                f"{', '.join(previous.front.names)}; give both the same loss and costs"
            )
        self.problem = problem
        self._known: dict[bytes, _Evaluation] = {}
        self._start = time.perf_counter()
        self.stage = stage
        self.budget = budget
        self.evaluations = 0
        self.front = previous.front if previous else Front.empty(problem.units.n_units, problem.objectives)
        self.history = list(previous.history) if previous else []
        last = self.history[-1] if self.history else {"generation": 0, "evaluations": 0, "seconds": 0.0}
        self._offset = {key: last[key] for key in ("generation", "evaluations", "seconds")}
        self._generations = self._closed_at = 0
        if previous:
            keys = previous.front.masks.fingerprints()
            objectives = previous.front.objectives
            self._known.update((key, _Evaluation(row, True)) for key, row in zip(keys, objectives, strict=True))
        self.survival: Survival | None = None

    @property
    def remaining(self) -> int:
        """How many masks may still be evaluated."""
        return self.budget - self.evaluations

    def __call__(self, masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate masks; absent units of the problem count as dropped, whatever a mask says.

        Returns:
            Objectives, float64 (n_masks, n_objectives), and whether each mask is new and on the front, bool (n_masks,).
            With a `survival`, the loss of a mask that is dropped in any case may be a lower bound.

        Raises:
            BudgetSpentError: There are more new masks than the budget pays for. As many as it pays for are evaluated.
        """
        if self.problem.absent is not None:
            masks = masks.without(self.problem.absent)
        batch = _Batch(masks, masks.fingerprints(), self.problem.costs_of(masks))
        # Built from the end, so that of equal masks the first one stays.
        first_at = {key: i for i, key in reversed(list(enumerate(batch.keys)))}
        new = sorted(i for key, i in first_at.items() if key not in self._known)
        n_unpaid = len(new) - self.remaining
        new = new[: self.remaining]
        bounds = np.full(len(masks), np.inf)
        if self.survival is not None:
            bounds = self.survival.bounds(batch.costs, self.front.objectives)
        self._evaluate(batch, new, bounds)
        self.evaluations += len(new)
        joined = self._merge(batch, new)
        if n_unpaid > 0:
            raise BudgetSpentError
        # A bound only says that a mask is dominated. Whether it is dropped depends on the others of its generation, and
        # a loss that is completed may change that for a third one; hence the loop.
        while self.survival is not None:
            known = [self._known[key] for key in batch.keys]
            undecided = self.survival.undecided(
                np.array([one.objectives for one in known]), np.array([one.complete for one in known])
            )
            incomplete = sorted({first_at[batch.keys[i]] for i in np.flatnonzero(undecided)})
            if not incomplete:
                break
            self._evaluate(batch, incomplete, np.full(len(masks), np.inf))
        return (
            np.array([self._known[key].objectives for key in batch.keys]).reshape(-1, len(self.problem.objectives)),
            np.array([key in joined for key in batch.keys], dtype=bool),
        )

    def _merge(self, batch: _Batch, new: list[int]) -> set[bytes]:
        """Add new masks to the front; returns the fingerprints of those that are on it."""
        # The others are dominated: that is why their evaluation stopped.
        complete = [i for i in new if self._known[batch.keys[i]].complete and self._known[batch.keys[i]].feasible]
        if not complete:
            return set()
        objectives = np.array([self._known[batch.keys[i]].objectives for i in complete])
        stages = [self.stage] * len(complete)
        found = Front(batch.masks.select(complete), objectives, stages, self.problem.objectives)
        self.front = self.front.merge(found)
        return {batch.keys[i] for i in complete}.intersection(self.front.masks.fingerprints())

    def _evaluate(self, batch: _Batch, indices: list[int], bounds: np.ndarray) -> None:
        """Evaluate some masks of a batch, each one up to its bound, and remember the results.

        Args:
            batch: The masks.
            indices: Which of them.
            bounds: float (n_masks,), of all masks of the batch.

        Raises:
            ValueError: Losses are not finite, or not one per mask.
        """
        problem = self.problem
        if problem.is_feasible is not None and indices:
            feasible = problem.is_feasible(batch.masks.select(indices))
            # Those that are feasible are overwritten below.
            for i in indices:
                self._known[batch.keys[i]] = _Evaluation(np.array([1.0, *batch.costs[i]]), True, feasible=False)
            indices = [i for i, one in zip(indices, feasible, strict=True) if one]
        if not indices:
            return
        masks = batch.masks if len(indices) == len(batch.masks) else batch.masks.select(indices)
        complete = np.ones(len(indices), dtype=bool)
        if isinstance(problem.evaluate, BoundedEvaluator):
            losses, complete = problem.evaluate.bounded(masks, bounds[indices])
        else:
            losses = np.asarray(problem.evaluate(masks), dtype=np.float64)
        if losses.shape != (len(indices),) or not np.isfinite(losses).all():
            raise ValueError(
                f"expected finite losses of shape ({len(indices)},) from the evaluator, found shape {losses.shape} "
                f"with {int((~np.isfinite(losses)).sum())} values that are not finite"
            )
        for i, loss, done in zip(indices, losses, complete, strict=True):
            self._known[batch.keys[i]] = _Evaluation(np.array([loss, *batch.costs[i]]), bool(done))

    def close_generation(self) -> None:
        """Add a row to the history, unless nothing was evaluated since the last one."""
        if self.evaluations == self._closed_at:
            return
        self._closed_at = self.evaluations
        self._generations += 1
        row = {
            "generation": self._offset["generation"] + self._generations,
            "evaluations": self._offset["evaluations"] + self.evaluations,
            "seconds": round(self._offset["seconds"] + time.perf_counter() - self._start, 3),
            "hypervolume": self.front.hypervolume(),
            "stage": self.stage,
        }
        self.history.append(row)
        if self.problem.progress:
            self.problem.progress(row)

    def result(self) -> SearchResult:
        """Front and history so far."""
        return SearchResult(self.front, self.history)
