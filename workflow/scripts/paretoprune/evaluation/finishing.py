"""Finishing: from masks to the networks that are published, in float32, and what the images say of them."""

import logging
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.copies import copied
from paretoprune.devices import repeatable
from paretoprune.evaluation.compute import Backends, batch_size_of, make_refit, n_processes, place
from paretoprune.evaluation.metrics import divergence_of, image_losses, predict
from paretoprune.evaluation.ordered_images import OrderedImages, hardest_first
from paretoprune.evaluation.task import Scores, Task
from paretoprune.evaluation.workers import run_in_processes
from paretoprune.masks.packed import PackedMasks
from paretoprune.networks.architectures import to_channels_last
from paretoprune.networks.tracing import NotTraceableError
from paretoprune.repair.refit import Refit
from paretoprune.repair.sequential import Refined, SequentialRefit
from paretoprune.settings import LOSSES, Compute, Evaluating

BATCH_SIZE = 64
_LOGGER = logging.getLogger("paretoprune")


class Finisher:
    """Builds the networks of masks, measures them, and chooses weights anew.

    Nothing is prepared before it is needed.

    Args:
        task: The dense network, which is copied, and the images.
        evaluating: What is put right, and the objective.
        compute: Device and processes. Networks are built and measured in float32, whatever its precision.
        refit: What re-fits weights, of an evaluator of the same task, so that layers it has solved are not solved
            again; None to make one.

    Raises:
        ValueError: The repair is unknown, or the dense network answers anything that is not finite.
    """

    def __init__(self, task: Task, evaluating: Evaluating, compute: Compute, refit: Refit | None = None) -> None:
        self._task, self._evaluating, self._compute = task, evaluating, compute
        self._device, self._n_processes = torch.device(compute.device), n_processes(compute)
        self._refit = make_refit(task, evaluating, self._device) if refit is None else refit
        self._backends = Backends(task, evaluating, self._device, self._refit)

    @cached_property
    def _sequential(self) -> SequentialRefit | None:
        """The sequential refit; None where the repair or the network has none."""
        if self._refit is None:
            return None
        images = place(self._task.calibration, self._device, torch.float32)
        try:
            return SequentialRefit(copied(self._backends.network).to(self._device).float(), self._refit, images)
        except NotTraceableError as error:
            _LOGGER.warning(
                "finished networks keep the weights that each layer was given on the dense network's inputs: %s", error
            )
            return None

    @property
    def _finishing(self) -> SequentialRefit | None:
        """The sequential refit, where finished networks are to be put through it."""
        return self._sequential if self._evaluating.sequential_refit else None

    @cached_property
    def _ordered(self) -> OrderedImages:
        """The images to measure on.

        In the order and with the dense answers of an evaluator in float32: sums over images in another order would
        differ in their last digits from those of a search.
        """
        with repeatable(), torch.inference_mode():
            computation = self._backends.choose(torch.float32)
        batch_size = batch_size_of(self._compute, self._task.images)
        return hardest_first(self._task, computation, self._evaluating.objective, self._device, batch_size)

    def build(self, mask: np.ndarray) -> nn.Module:
        """The pruned and repaired network of one mask, as an independent module on the CPU, in evaluation mode.

        Where the repair re-fits weights, they are re-fitted once more, layer by layer (`repair.sequential`).

        Args:
            mask: bool (n_weights,).
        """
        sequential = self._finishing
        if sequential is not None:
            return self._refitted(sequential, mask).network
        with repeatable(), torch.inference_mode():
            pruned = self._backends.plain
            pruned.prepare(torch.from_numpy(mask).to(self._device))
        network = copied(self._backends.network)
        network.load_state_dict(pruned.network.state_dict())
        return network

    def _refitted(self, sequential: SequentialRefit, mask: np.ndarray, *, reselect: bool = False) -> Refined:
        with repeatable(), torch.inference_mode():
            return sequential(torch.from_numpy(mask).to(self._device), reselect=reselect)

    def measure(self, network: nn.Module) -> tuple[float, float]:
        """Error and divergence of a finished network on the images, in float32."""
        evaluated = self._ordered
        network = to_channels_last(copied(network).to(self._device))
        with repeatable(), torch.inference_mode():
            logits = predict(network, evaluated.images.float(), BATCH_SIZE)
            wrong, kl = image_losses(logits, evaluated.labels, evaluated.dense_log_probabilities)
        return int(wrong.sum()) / len(wrong), divergence_of(float(kl.sum()) / len(kl))

    def finish(
        self, masks: PackedMasks, *, reselect: bool = False
    ) -> tuple[PackedMasks, list[dict[str, Tensor]], Scores]:
        """Build the networks of masks and measure them, in as many processes as are granted.

        Args:
            masks: What is built.
            reselect: Where networks are re-fitted once more, also choose each layer's weights anew on the pruned
                network's own inputs (`reselect`), and keep of the two networks the one with the smaller objective.

        Returns:
            The masks, with `reselect` perhaps others that keep as many weights of each layer; the state of each
            network, by parameter and buffer, on the CPU; and what the images say of it.
        """
        self._prepare()
        sequential = self._finishing if reselect else None

        def finish_one(i: int) -> tuple[np.ndarray, dict[str, np.ndarray], float, float]:
            mask = masks.unpack(i)
            tried = [(mask, self.build(mask))]
            if sequential is not None and not mask.all():
                refined = self._refitted(sequential, mask, reselect=True)
                tried.append((refined.kept.cpu().numpy(), refined.network))
            measured = [self.measure(network) for _, network in tried]
            at = LOSSES.index(self._evaluating.objective)
            best = min(range(len(tried)), key=lambda j: measured[j][at])
            state = {key: value.numpy() for key, value in tried[best][1].state_dict().items()}
            return tried[best][0], state, *measured[best]

        found = run_in_processes(finish_one, len(masks), self._n_processes)
        states = [{key: torch.from_numpy(value) for key, value in state.items()} for _, state, _, _ in found]
        scores = Scores(np.array([e for *_, e, _ in found]), np.array([d for *_, d in found]))
        return PackedMasks.pack_each((mask for mask, *_ in found), masks.n_units), states, scores

    def _prepare(self) -> None:
        """Make what all masks need before processes are forked, so that it is made once."""
        if self._finishing is None:
            with repeatable(), torch.inference_mode():
                _ = self._backends.plain
        _ = self._ordered

    def reselect(self, masks: PackedMasks) -> PackedMasks:
        """Masks that keep as many weights of each layer, chosen anew on the pruned network's own inputs.

        See `repair.sequential`; masks come back as they are where networks cannot be re-fitted in this way.
        """
        sequential = self._sequential
        if sequential is None:
            return masks

        def reselect_one(i: int) -> np.ndarray:
            return self._refitted(sequential, masks.unpack(i), reselect=True).kept.cpu().numpy()

        return PackedMasks.pack_each(run_in_processes(reselect_one, len(masks), self._n_processes), masks.n_units)
