"""Candidates on a GPU: one recording from the mask's words to all logits, replayed for each candidate.

Images, dense weights and everything between stay on the device; a candidate costs one copy of its words and one launch.
Without a GPU the same arithmetic runs step by step.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from paretoprune.devices import out_of_memory
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.metrics import image_losses
from paretoprune.masks.packed import n_words_for

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
        while images.device.type == "cuda" and not self._prepared():
            self.batch_size //= 2
            # Outside of the handler, whose traceback would keep what has just failed.
            torch.cuda.empty_cache()
            _LOGGER.warning("memory ran out; going on with batches of %d images", self.batch_size)

    def _prepared(self) -> bool:
        """Record; false if memory ran out and smaller batches may help."""
        try:
            with torch.cuda.device(self._images.device):
                self._record()
        except RuntimeError as error:
            if not out_of_memory(error) or self.batch_size == 1:
                raise
            return False
        return True

    def _compute(self) -> Tensor:
        return self._network.logits(self._words, self._images.split(self.batch_size))

    def _record(self) -> None:
        """Record one candidate, unless some operation waits for the device, which a recording cannot hold."""
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(N_WARM_UP):
                self._compute()
            stream.synchronize()
            waits = torch.cuda.get_sync_debug_mode()
            try:
                torch.cuda.set_sync_debug_mode("error")
                self._compute()
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
                _LOGGER.warning("the GPU cannot record this network (%s); it is run step by step", reason)
                return
            finally:
                torch.cuda.set_sync_debug_mode(waits)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
            self._logits = self._compute()
        self._graph = graph
        if not self._replays():
            _LOGGER.warning("the GPU's recording does not repeat what it recorded; the network is run step by step")
            self._graph = None

    def _replays(self) -> bool:
        """Whether the recording gives what running step by step does, for a mask that it was not recorded with."""
        assert self._graph is not None
        with torch.inference_mode():
            self._words.copy_(torch.arange(len(self._words), device=self._words.device) * 0x5DEECE66D)
            self._graph.replay()
            replayed = self._logits.clone()
            return torch.allclose(replayed, self._compute(), rtol=1e-2, atol=1e-2, equal_nan=True)

    def losses(
        self, words: np.ndarray, labels: Tensor, dense_log_probabilities: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate candidates on all images.

        The masks go to the device together, and it is waited for once, at the end.

        Args:
            words: uint64 (n_masks, n_words).
            labels: int64 (n,), on the device.
            dense_log_probabilities: float64 (n, n_classes), on the device.

        Returns:
            Share of wrong answers and mean divergence (nats), each float64 (n_masks,).
        """
        rows = torch.from_numpy(np.array(words, order="C").view(np.int64)).to(self._words.device)
        found = []
        with torch.inference_mode():
            for row in rows:
                self._words.copy_(row)
                if self._graph is not None:
                    self._graph.replay()
                logits = self._logits if self._graph is not None else self._compute()
                wrong, kl = image_losses(logits, labels, dense_log_probabilities)
                # Sums of whole numbers, and of float64 in a fixed order.
                found.append(torch.stack([wrong.sum().double() / len(labels), kl.sum() / len(labels)]))
        results = torch.stack(found).cpu().numpy() if found else np.zeros((0, 2))
        return results[:, 0], results[:, 1]
