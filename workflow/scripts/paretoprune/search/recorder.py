"""The recorder: evaluates every mask of a search once, keeps the front of all of them and the course of the search."""

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.problem import BoundedEvaluate, Problem
from paretoprune.search.survival import Survival

HISTORY_COLUMNS = ("generation", "evaluations", "seconds", "hypervolume", "stage")


@dataclass
class SearchResult:
    """What a search leaves behind.

    Attributes:
        front: Every non-dominated network that was evaluated, sparsest first.
        history: One row a generation with the keys `HISTORY_COLUMNS`; evaluations and seconds are cumulative.
    """

    front: Front
    history: list[dict[str, Any]]


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a history written with the columns `HISTORY_COLUMNS`."""
    kinds = {"generation": int, "evaluations": int, "seconds": float, "hypervolume": float, "stage": str}
    with Path(path).open(newline="", encoding="utf-8") as handle:
        return [{key: kinds[key](row[key]) for key in HISTORY_COLUMNS} for row in csv.DictReader(handle)]


@dataclass(frozen=True)
class _Evaluated:
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
    """Evaluates masks, each distinct one once, and remembers the non-dominated.

    Args:
        problem: Whose masks.
        budget: Largest number of masks to evaluate.
        stage: Name given to what is found from now on; may be changed.
        before: A search that this one continues: its front is the first front, its history comes first.

    Attributes:
        survival: What becomes of the masks evaluated next, so that those that it drops anyway may be stopped early;
            None to evaluate all in full.

    Raises:
        ValueError: The search before has other objectives.
    """

    def __init__(self, problem: Problem, *, budget: int, stage: str, before: SearchResult | None = None) -> None:
        if before and before.front.names != problem.objectives:
            raise ValueError(
                f"expected to continue a search of {', '.join(problem.objectives)}, found one of "
                f"{', '.join(before.front.names)}; give both the same loss and costs"
            )
        self.problem = problem
        self._known: dict[bytes, _Evaluated] = {}
        self._start = time.perf_counter()
        self.stage = stage
        self.budget = budget
        self.evaluations = 0
        self.front = before.front if before else Front.empty(problem.units.n_units, problem.objectives)
        self.history = list(before.history) if before else []
        last = self.history[-1] if self.history else {"generation": 0, "evaluations": 0, "seconds": 0.0}
        self._offset = {key: last[key] for key in ("generation", "evaluations", "seconds")}
        self._generations = self._closed_at = 0
        if before:
            keys = before.front.masks.fingerprints()
            self._known.update((key, _Evaluated(f, True)) for key, f in zip(keys, before.front.objectives, strict=True))
        self.survival: Survival | None = None

    @property
    def remaining(self) -> int:
        """How many masks may still be evaluated."""
        return self.budget - self.evaluations

    def __call__(self, masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate masks.

        Units that the problem says are absent count as dropped, whatever a mask says of them.

        Returns:
            Objectives (n, n_objectives), and whether each mask is new and on the front, bool (n,). Where `survival` is
            given, the loss of a mask that it drops in any case may be a lower bound.

        Raises:
            BudgetSpentError: There are more new masks than the budget pays for; those it pays for are evaluated.
        """
        if self.problem.absent is not None:
            masks = masks.without(self.problem.absent)
        batch = _Batch(masks, masks.fingerprints(), self.problem.costs_of(masks))
        first_at = {key: i for i, key in reversed(list(enumerate(batch.keys)))}
        fresh = sorted(i for key, i in first_at.items() if key not in self._known)
        unpaid = len(fresh) - self.remaining
        fresh = fresh[: self.remaining]
        bounds = np.full(len(masks), np.inf)
        if self.survival is not None:
            bounds = self.survival.bounds(batch.costs, self.front.objectives)
        self._evaluate(batch, fresh, bounds)
        self.evaluations += len(fresh)
        joined = self._merge(batch, fresh)
        if unpaid > 0:
            raise BudgetSpentError
        while self.survival is not None:
            known = [self._known[key] for key in batch.keys]
            undecided = self.survival.undecided(
                np.array([j.objectives for j in known]), np.array([j.complete for j in known])
            )
            again = sorted({first_at[batch.keys[i]] for i in np.flatnonzero(undecided)})
            if not again:
                break
            self._evaluate(batch, again, np.full(len(masks), np.inf))
        return (
            np.array([self._known[key].objectives for key in batch.keys]).reshape(-1, len(self.problem.objectives)),
            np.array([key in joined for key in batch.keys], dtype=bool),
        )

    def _merge(self, batch: "_Batch", fresh: list[int]) -> set[bytes]:
        """Add new masks to the front; returns the fingerprints of those that are on it."""
        # The others are dominated: that is why evaluating them stopped.
        whole = [i for i in fresh if self._known[batch.keys[i]].complete and self._known[batch.keys[i]].feasible]
        if not whole:
            return set()
        evaluated = np.array([self._known[batch.keys[i]].objectives for i in whole])
        stages = [self.stage] * len(whole)
        self.front = self.front.merge(Front(batch.masks.select(whole), evaluated, stages, self.problem.objectives))
        return {batch.keys[i] for i in whole}.intersection(self.front.masks.fingerprints())

    def _evaluate(self, batch: "_Batch", which: list[int], bounds: np.ndarray) -> None:
        """Have some masks evaluated, each up to its bound, and remember what came out."""
        problem = self.problem
        if problem.is_feasible is not None and which:
            good = problem.is_feasible(batch.masks.select(which))
            for i in which:
                self._known[batch.keys[i]] = _Evaluated(np.array([1.0, *batch.costs[i]]), True, feasible=False)
            which = [i for i, fine in zip(which, good, strict=True) if fine]
        if not which:
            return
        chosen = batch.masks if len(which) == len(batch.masks) else batch.masks.select(which)
        complete = np.ones(len(which), dtype=bool)
        if isinstance(problem.evaluate, BoundedEvaluate):
            losses, complete = problem.evaluate.bounded(chosen, bounds[which])
        else:
            losses = np.asarray(problem.evaluate(chosen), dtype=np.float64)
        if losses.shape != (len(which),) or not np.isfinite(losses).all():
            raise ValueError(
                f"expected finite losses of shape ({len(which)},) from the evaluator, found shape {losses.shape} with "
                f"{int((~np.isfinite(losses)).sum())} values that are not finite"
            )
        for i, loss, whole in zip(which, losses, complete, strict=True):
            self._known[batch.keys[i]] = _Evaluated(np.array([loss, *batch.costs[i]]), bool(whole))

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
