"""Candidates on a GPU: one recording from the mask's words to all logits, replayed for each candidate.

Images, dense weights and everything between stay on the device; a candidate costs one copy of its words and one launch.
Without a GPU the same arithmetic runs step by step.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from paretoprune.fused import FusedNetwork
from paretoprune.judging import image_losses, out_of_memory
from paretoprune.masks import n_words_for

_LOGGER = logging.getLogger("paretoprune")
# Runs before a recording, which let libraries choose their kernels and take their memory.
N_WARM_UP = 3


class CapturedNetwork:
    """A fused network with its images, as one recorded computation.

    Args:
        network: What takes the masks.
        images: Images (n, c, h, w) on the device, in the type to compute in.
        batch_size: Images per forward pass; halved whenever memory runs out.
    """

    def __init__(self, network: FusedNetwork, images: Tensor, batch_size: int) -> None:
        self._network, self._images, self.batch_size = network, images, batch_size
        self._words = torch.zeros(n_words_for(network.layout.n_weights), dtype=torch.int64, device=images.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        while True:
            try:
                if images.device.type == "cuda":
                    self._record()
                return
            except RuntimeError as error:
                if not out_of_memory(error) or self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                _LOGGER.warning("memory ran out; going on with batches of %d images", self.batch_size)

    def _compute(self) -> Tensor:
        return self._network.logits(self._words, self._images.split(self.batch_size))

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(N_WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(), torch.cuda.graph(graph):
                self._logits = self._compute()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            # Some operation of the network waits for the device, which a recording cannot.
            _LOGGER.warning(
                "the GPU cannot record this network (%s); it is run step by step", str(error).split("\n")[0]
            )
            torch.cuda.synchronize()
            return
        self._graph = graph

    def losses(
        self, words: np.ndarray, labels: Tensor, dense_log_probabilities: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Judge candidates on all images.

        The device is waited for once, at the end; until then candidates queue up behind one another.

        Args:
            words: uint64 (n_masks, n_words).
            labels: int64 (n,), on the device.
            dense_log_probabilities: float64 (n, n_classes), on the device.

        Returns:
            Share of wrong answers and mean divergence (nats), each float64 (n_masks,).
        """
        found = []
        with torch.inference_mode():
            for row in np.ascontiguousarray(words).view(np.int64):
                self._words.copy_(torch.from_numpy(row.copy()))
                if self._graph is not None:
                    self._graph.replay()
                logits = self._logits if self._graph is not None else self._compute()
                wrong, kl = image_losses(logits, labels, dense_log_probabilities)
                # Sums of whole numbers, and of float64 in a fixed order.
                found.append(torch.stack([wrong.sum().double() / len(labels), kl.sum() / len(labels)]))
        results = torch.stack(found).cpu().numpy() if found else np.zeros((0, 2))
        return results[:, 0], results[:, 1]
