"""Evaluating a population of pruned networks: from masks to losses.

How to compute is chosen in `evaluation.compute`. Candidates are evaluated in several processes (`evaluation.workers`),
or on a GPU as one recording (`evaluation.captured`); results do not depend on it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from paretoprune.devices import repeatable
from paretoprune.evaluation.candidate import CandidateEvaluator, Evaluation
from paretoprune.evaluation.captured import CapturedNetwork
from paretoprune.evaluation.compute import Backends, batch_size_of, make_refit, n_processes, precision_of
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.metrics import divergence_of
from paretoprune.evaluation.ordered_images import hardest_first
from paretoprune.evaluation.prefixes import NO_PLAN, Plan, PrefixCache
from paretoprune.evaluation.task import Scores, Task
from paretoprune.evaluation.workers import WorkerPool
from paretoprune.masks.packed import PackedMasks
from paretoprune.repair.refit import RefitCosts
from paretoprune.repair.repairs import repair_named
from paretoprune.settings import LOSSES, Compute, Evaluating


class PopulationEvaluator:
    """Turns masks into losses; equal masks always get equal losses.

    Args:
        task: The dense network, which is copied and left as it is, and the images.
        evaluating: What is put right before evaluating, and what is minimised.
        compute: Precision, device and processes; `auto` is resolved in `evaluation.compute`.

    Attributes:
        layout: Where the prunable weights lie in a mask.
        objective: `error` (top-1) or `divergence` (from the dense network's answers, see `evaluation.metrics`).
        network: What takes the masks.
        evaluated: What candidates are evaluated on, in the evaluator's order and type, on its device.
        batch_size: Images per forward pass.
        dense: What the images say of the dense network.
        refit: What re-fits the weights of candidates; None unless the repair does.
        prefixes: Kept activations.
        n_workers: Processes to evaluate in.
        n_images_seen: Images that candidates were evaluated on so far.

    Raises:
        ValueError: An option is unknown, or the dense network answers anything that is not finite.
    """

    def __init__(self, task: Task, evaluating: Evaluating, compute: Compute) -> None:
        if evaluating.objective not in LOSSES:
            raise ValueError(f"expected an objective among {', '.join(LOSSES)}, found '{evaluating.objective}'")
        self.layout, self.objective = task.units, evaluating.objective
        self._device = torch.device(compute.device)
        dtype, self.batch_size = precision_of(compute), batch_size_of(compute, task.images)
        self.refit = make_refit(task, evaluating, self._device)
        backends = Backends(task, evaluating, self._device, self.refit)
        with repeatable(), torch.inference_mode():
            chosen = backends.choose(dtype)
        self.network, self._dtype = chosen.network, chosen.dtype
        self.ordered = hardest_first(task, chosen, evaluating.objective, self._device, self.batch_size)
        self.dense = Scores(np.array([self.ordered.dense_error]), np.zeros(1))
        self.n_workers = n_processes(compute)
        repairs = repair_named(evaluating.repair).make is not None
        n_calibration = len(task.calibration[: evaluating.repair_images]) if repairs else 0
        budget = compute.prefix_cache_mb * 2**20 if self._device.type == "cpu" else 0
        self.prefixes = PrefixCache(
            self.network.cuts, self.layout, len(task.images), n_calibration, self._dtype, budget
        )
        self._evaluator = CandidateEvaluator(
            self.network,
            self.ordered.images,
            self.ordered.labels,
            self.ordered.dense_log_probabilities,
            objective=evaluating.objective,
            batch_size=self.batch_size,
            prefixes=self.prefixes,
        )
        self._pool: WorkerPool | None = None
        self._captured: CapturedNetwork | None = None
        self.n_images_seen = 0

    @property
    def precision(self) -> str:
        """What candidates are computed in, `float32` or `bfloat16`."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def is_fused(self) -> bool:
        """Whether the network could be traced and the fused path agreed with the plain one."""
        return isinstance(self.network, FusedNetwork)

    @property
    def n_classes(self) -> int:
        """Number of classes that the network tells apart."""
        return self.ordered.dense_log_probabilities.shape[1]

    def _evaluations(self, words: np.ndarray, bounds: Sequence[float]) -> list[Evaluation]:
        """Evaluate candidates uint64 (n_masks, n_words), each up to its bound."""
        if self._device.type != "cpu" and isinstance(self.network, FusedNetwork) and self.network.can_be_recorded:
            if self._captured is None:
                with repeatable():
                    self._captured = CapturedNetwork(self.network, self.ordered.images, self.batch_size)
            errors, kls = self._captured.losses(words, self.ordered.labels, self.ordered.dense_log_probabilities)
            self.n_images_seen += len(self.ordered.images) * len(words)
            return [
                Evaluation(float(e), divergence_of(float(k)), len(self.ordered.images), True)
                for e, k in zip(errors, kls, strict=True)
            ]
        found: dict[int, Evaluation] = {}
        plans: dict[int, Plan] = {}

        def arguments(i: int) -> tuple[np.ndarray, float, Plan]:
            plans[i] = self.prefixes.plan(words[i])
            return words[i], bounds[i], plans[i]

        def done(i: int, evaluation: Evaluation) -> None:
            self.prefixes.close(plans.pop(i, NO_PLAN), evaluation.complete)
            found[i] = evaluation

        try:
            if self.n_workers > 1 and len(words) > 1:
                if self._pool is None:
                    self.prefixes.allocate()
                    self._pool = WorkerPool(self._evaluator, self.n_workers)
                self._pool.run(range(len(words)), arguments, done)
            else:
                with repeatable():
                    for i in range(len(words)):
                        done(i, self._evaluator(*arguments(i)))
        except BaseException:
            self.close()
            raise
        self.n_images_seen += sum(evaluation.n_seen for evaluation in found.values())
        return [found[i] for i in range(len(words))]

    def score(self, masks: PackedMasks) -> Scores:
        """Evaluate each mask's pruned and repaired network."""
        evaluations = self._evaluations(masks.words, [math.inf] * len(masks))
        return Scores(np.array([v.error for v in evaluations]), np.array([v.divergence for v in evaluations]))

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Losses float64 (n_masks,): errors or divergences, as the objective says."""
        return self.bounded(masks, np.full(len(masks), math.inf))[0]

    def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate masks, each only until its loss is certain to lie above its bound.

        Args:
            masks: What is evaluated.
            bounds: float (n_masks,); infinite to evaluate on all images.

        Returns:
            Losses float64 (n_masks,), and whether each was evaluated on all images, bool (n_masks,): where not, the
            loss is a lower bound, larger than the given bound.
        """
        evaluations = self._evaluations(masks.words, np.asarray(bounds, dtype=np.float64).tolist())
        losses = np.array([v.error if self.objective == "error" else v.divergence for v in evaluations])
        return losses, np.array([v.complete for v in evaluations], dtype=bool)

    def refit_costs(self) -> RefitCosts:
        """What re-fitting says of each weight of a candidate, for a guide of moves.

        Raises:
            ValueError: The evaluator does not re-fit.
        """
        if self.refit is None:
            raise ValueError("a guide by re-fitted costs needs repair 'reconstruct'; choose it, or other guides")
        return RefitCosts(self.refit)

    def precompute(self, masks: PackedMasks) -> None:
        """Re-fit the layers of some masks ahead: candidates made of them find them, in every process."""
        if self.refit is None:
            return
        self._stop_workers()
        with repeatable(), torch.inference_mode():
            for i in range(len(masks)):
                self.refit(torch.from_numpy(masks.unpack(i)).to(self._device))

    def _stop_workers(self) -> None:
        """End the processes that evaluate: what is prepared from now on must be there when they start."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def close(self) -> None:
        """End the worker processes, let go of kept activations and recordings; all come back when they are needed."""
        self._stop_workers()
        self.prefixes.forget()
        self._captured = None

    def __enter__(self) -> "PopulationEvaluator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
