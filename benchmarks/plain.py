"""The plain implementation that the whole search is measured against: the code that one would write first.

Every candidate is a deep copy of the network with its weights multiplied by the mask, evaluated in full by torch's
eager float32 in large batches, one after the other in one process. Phase 2's populations are booleans (n, n_weights) in
pymoo's NSGA-II with its default duplicate elimination. The method is the same down to the random draws: with an
evaluator that gives the same losses, both implementations find the same front (`tests/test_benchmarks.py`).
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from paretoprune.evaluation.metrics import divergence, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks, pack_rows, unpack_row
from paretoprune.repair.repairs import make_repair
from paretoprune.search.adaptive import AdaptiveVariation
from paretoprune.search.corridor import Corridor
from paretoprune.search.phase2 import guided_algorithm
from paretoprune.search.problem import Effort
from paretoprune.search.problem import Problem as SearchProblem
from paretoprune.search.pymoo_adapter import run_algorithm
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.settings import Phase2
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from torch import Tensor, nn

BATCH_SIZE = 1000


class PlainEvaluator:
    """From masks to losses, the usual way.

    Args:
        task: The trained dense network, its units, and the images that pruned ones are evaluated and repaired on.
        repair: `none` or `batchnorm`, on all calibration images.
        objective: `error` or `divergence`.
    """

    def __init__(self, task: Task, *, repair: str, objective: str) -> None:
        self._task, self._objective = task, objective
        self._repair = make_repair(repair, task.network, task.calibration)
        self._dense = self.predict(task.network).double().log_softmax(dim=1)

    def predict(self, network: nn.Module) -> Tensor:
        """Logits of all images, float32 (n, n_classes)."""
        with torch.no_grad():
            return torch.cat([network(batch) for batch in self._task.images.split(BATCH_SIZE)])

    def prune(self, mask: np.ndarray) -> nn.Module:
        """A masked and repaired copy of the network; the mask is bool (n_weights,)."""
        pruned = copy.deepcopy(self._task.network)
        parameters = dict(pruned.named_parameters())
        with torch.no_grad():
            for name, part in self._task.units.split(mask).items():
                parameters[name].mul_(torch.from_numpy(part))
        self._repair(pruned)
        return pruned

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Losses float64 (n_masks,)."""
        errors = []
        for i in range(len(masks)):
            logits = self.predict(self.prune(masks.unpack(i)))
            by_label = self._objective == "error"
            errors.append(top1_error(logits, self._task.labels) if by_label else divergence(logits, self._dense))
        return np.array(errors)


def _pack(row: np.ndarray) -> Genome:
    return Genome(pack_rows(row[None])[0])


def _packed(rows: np.ndarray) -> np.ndarray:
    x = np.empty((len(rows), 1), dtype=object)
    x[:, 0] = [_pack(row) for row in rows]
    return x


def _booleans(x: np.ndarray, n_weights: int) -> np.ndarray:
    return np.array([unpack_row(genome.words, n_weights) for genome in x[:, 0]])


class _BooleanProblem(Problem):
    def __init__(self, n_weights: int, recorder: Recorder, variation: AdaptiveVariation) -> None:
        super().__init__(n_var=n_weights, n_obj=2, xl=0, xu=1, vtype=bool)
        self._recorder, self._variation = recorder, variation

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"], joined = self._recorder(PackedMasks.pack(x))
        for row, success in zip(x, joined, strict=True):
            self._variation.reward(_pack(row), bool(success))


class _BooleanCrossover(Crossover):
    def __init__(self, packed: Crossover) -> None:
        super().__init__(n_parents=2, n_offsprings=1, prob=1.0)
        self._operator = packed

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        parents = np.stack([_packed(x[0]), _packed(x[1])])
        return _booleans(self._operator._do(problem, parents, random_state=random_state)[0], problem.n_var)[None]


class _BooleanMutation(Mutation):
    def __init__(self, packed: Mutation) -> None:
        super().__init__()
        self._operator = packed

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        return _booleans(self._operator._do(problem, _packed(x), random_state=random_state), problem.n_var)


def search_corridor(
    problem: SearchProblem,
    corridors: Sequence[Corridor],
    guides: Sequence[np.ndarray],
    before: SearchResult,
    settings: Phase2,
    effort: Effort,
) -> SearchResult:
    """Phase 2 by NSGA-II on booleans; arguments as for `paretoprune.search.phase2.search_corridor`, one corridor."""
    (corridor,) = corridors
    n_weights, population = problem.units.n_units, effort.population
    recorder = Recorder(problem, budget=effort.evaluations, stage="phase2", previous=before)
    packed, variation = guided_algorithm(
        corridor,
        [corridor.rank(scores) for scores in guides],
        before.front.thinned(max(2, population * 3 // 4)).masks,
        settings,
        population,
        np.random.default_rng(effort.seed),
    )
    algorithm = NSGA2(
        pop_size=population,
        sampling=_booleans(packed.initialization.sampling().get("X"), n_weights),
        crossover=_BooleanCrossover(packed.mating.crossover),
        mutation=_BooleanMutation(packed.mating.mutation),
    )
    run_algorithm(algorithm, _BooleanProblem(n_weights, recorder, variation), recorder, effort.seed)
    return recorder.result()
