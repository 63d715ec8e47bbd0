"""Evaluating one candidate: losses image by image, hardest first, stopped as soon as the objective is too large."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paretoprune.devices import out_of_memory
from paretoprune.evaluation.metrics import divergence_of, image_losses
from paretoprune.evaluation.prefixes import Plan, PrefixCache
from paretoprune.evaluation.prunable import PrunableNetwork
from paretoprune.masks.packed import unpack_row

_LOGGER = logging.getLogger("paretoprune")


@dataclass(frozen=True)
class Evaluation:
    """What was seen of one candidate.

    Attributes:
        error: Wrong answers as a share of all images, those not looked at counted as right.
        divergence: 1 - exp(-KL) over all images, those not looked at counted as 0.
        n_seen: Images looked at.
        complete: Whether these were all; otherwise both scores are lower bounds.
    """

    error: float
    divergence: float
    n_seen: int
    complete: bool


class CandidateEvaluator:
    """Evaluates candidates one by one, on images in a fixed order.

    Args:
        network: What takes the masks.
        images: Images (n, c, h, w), hardest first, on the device and in the type to compute in.
        labels: int64 (n,).
        dense_log_probabilities: float64 (n, n_classes).
        objective: `error` or `divergence`: what bounds refer to.
        batch_size: Images per forward pass; halved for a candidate as long as memory runs out.
        prefixes: Activations of earlier candidates.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        images: Tensor,
        labels: Tensor,
        dense_log_probabilities: Tensor,
        *,
        objective: str,
        batch_size: int,
        prefixes: PrefixCache,
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.dense_log_probabilities = dense_log_probabilities
        self.objective, self.batch_size, self.prefixes = objective, batch_size, prefixes

    def __call__(self, words: np.ndarray, bound: float = math.inf, plan: Plan | None = None) -> Evaluation:
        """Evaluate the candidate uint64 (n_words,), and stop once its objective is certain to be above `bound`."""
        batch_size = self.batch_size
        while True:
            try:
                with torch.inference_mode():
                    return self._evaluate(words, bound, plan or Plan(), batch_size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or batch_size == 1:
                    raise
                # Only for this candidate: others shall be evaluated the same way in every process.
                batch_size //= 2
                _LOGGER.warning("memory ran out; evaluating the candidate again in batches of %d images", batch_size)

    def _evaluate(self, words: np.ndarray, bound: float, plan: Plan, batch_size: int) -> Evaluation:
        network, prefixes, n = self.network, self.prefixes, len(self.images)
        kept = torch.from_numpy(unpack_row(words, network.layout.n_weights)).to(self.images.device)
        cut, source = None, self.images
        calibrated = None
        if plan.start is not None:
            cut = prefixes.cuts[plan.start[0]]
            source, calibrated = prefixes.tensors(*plan.start)
        slots = {prefixes.cuts[i]: prefixes.tensors(i, slot) for i, slot in plan.keep.items()}
        network.prepare(kept, cut, calibrated, {place: rows for place, (_, rows) in slots.items()})
        wrong, kl = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.float64)
        seen = 0
        for batch in source.split(batch_size):
            here = slice(seen, seen + len(batch))
            logits = network.answer(batch, cut, {place: rows[here] for place, (rows, _) in slots.items()})
            wrong[here], kl[here] = image_losses(logits, self.labels[here], self.dense_log_probabilities[here])
            seen += len(batch)
            if seen < n and bound < math.inf and self._at_least(wrong, kl) > bound:
                break
        # Sums over all images in one order, whether or not the rest is 0: nothing else could be compared exactly.
        error = int(wrong.sum()) / n
        return Evaluation(error, divergence_of(float(kl.sum()) / n), seen, seen == n)

    def _at_least(self, wrong: Tensor, kl: Tensor) -> float:
        """The objective if every image not yet seen is answered as the dense network does."""
        if self.objective == "error":
            return int(wrong.sum()) / len(wrong)
        return divergence_of(float(kl.sum()) / len(kl))
