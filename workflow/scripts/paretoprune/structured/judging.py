"""Candidates of a search over units: small networks, re-fitted and measured as they would be shipped."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.copies import copied
from paretoprune.data.mixing import mixed
from paretoprune.devices import repeatable
from paretoprune.evaluation.metrics import divergence, predict, top1_error
from paretoprune.evaluation.task import Scores
from paretoprune.evaluation.workers import run_in_processes
from paretoprune.importance.curvature import DAMPING
from paretoprune.masks.packed import PackedMasks
from paretoprune.repair.sequential import SAMPLES_PER_COLUMN
from paretoprune.structured.refit import SlimRefit
from paretoprune.structured.units import ChannelUnits
from paretoprune.telling import Telling

BATCH_SIZE = 64
# Samples of a layer's columns, for each of its columns, while searching.
CANDIDATE_SAMPLES = 24


@dataclass(frozen=True)
class SlimTask:
    """A trained network, what can be cut of it, and the images that small networks are re-fitted and measured on.

    Attributes:
        network: The whole network; it is left as it is.
        units: What can be cut.
        images: Images to measure on, float32 (n, ...), normalised.
        labels: Their labels, int64 (n,).
        calibration: Images for re-fits, normalised, in random order; labels are not needed.
    """

    network: nn.Module
    units: ChannelUnits
    images: Tensor
    labels: Tensor
    calibration: Tensor

    def to(self, device: torch.device) -> "SlimTask":
        """The same on a device."""
        return SlimTask(
            copied(self.network).to(device),
            self.units,
            self.images.to(device),
            self.labels.to(device),
            self.calibration.to(device),
        )


@dataclass(frozen=True)
class Judging:
    """How small networks are repaired and measured.

    Attributes:
        repair: `none`, `batchnorm` (statistics corrected), or `reconstruct` (every layer re-fitted too).
        loss: `error` or `divergence`; candidates' divergence is measured on mixtures of images, see `data.mixing`.
        n_repair_images: Calibration images that candidates are repaired on, the first ones; None for all.
        n_images: Images that candidates are measured on, the first ones; None for all.
        damping: Of re-fits, see `importance.curvature.damped`.
        n_processes: Processes, each of one thread.
    """

    repair: str = "reconstruct"
    loss: str = "divergence"
    n_repair_images: int | None = 384
    n_images: int | None = None
    damping: float = DAMPING
    n_processes: int = 1


class SlimJudge:
    """Builds small networks, repairs and measures them, in as many processes as are granted.

    Args:
        task: What is cut and measured.
        judging: How.
    """

    def __init__(self, task: SlimTask, judging: Judging) -> None:
        self._task, self._judging = task, judging

    @cached_property
    def _refit(self) -> SlimRefit | None:
        """Of candidates: on few images, and fewer samples of each."""
        return self._refit_on(self._task.calibration[: self._judging.n_repair_images], CANDIDATE_SAMPLES)

    @cached_property
    def _last_refit(self) -> SlimRefit | None:
        """Of networks that are published."""
        return self._refit_on(self._task.calibration, SAMPLES_PER_COLUMN)

    def _refit_on(self, images: Tensor, samples: int) -> SlimRefit | None:
        task, judging = self._task, self._judging
        if judging.repair == "none":
            return None
        fits, damping = judging.repair == "reconstruct", judging.damping
        with repeatable():
            return SlimRefit(task.network, task.units, images, fits=fits, damping=damping, samples_per_column=samples)

    @cached_property
    def _dense_log_probabilities(self) -> Tensor:
        return self._log_probabilities(self._task.images)

    @cached_property
    def _mixtures(self) -> tuple[Tensor, Tensor]:
        """Mixtures of the images that candidates are measured on, and what the whole network says of them."""
        images = mixed(self._task.images[: self._judging.n_images], torch.Generator().manual_seed(0))
        return images, self._log_probabilities(images)

    def _log_probabilities(self, images: Tensor) -> Tensor:
        logits = predict(copied(self._task.network).float(), images, BATCH_SIZE)
        return functional.log_softmax(logits.double(), dim=1)

    def build(self, mask: np.ndarray) -> nn.Module:
        """The small network of a mask, bool (n_units,), as it is published."""
        return self._repaired(mask, self._last_refit)

    def candidate(self, mask: np.ndarray) -> nn.Module:
        """The small network of a mask, bool (n_units,), as it is judged while searching."""
        return self._repaired(mask, self._refit)

    def _repaired(self, mask: np.ndarray, refit: SlimRefit | None) -> nn.Module:
        if refit is None:
            return self._task.units.slim(self._task.network, mask)
        with repeatable():
            return refit(mask)

    def measure(self, network: nn.Module) -> tuple[float, float]:
        """Error and divergence of a network on all images."""
        with repeatable():
            logits = predict(network, self._task.images, BATCH_SIZE)
        return top1_error(logits, self._task.labels), divergence(logits, self._dense_log_probabilities)

    def loss(self, network: nn.Module) -> float:
        """The loss of a candidate."""
        if self._judging.loss == "divergence":
            return self._diverged(network)
        n_images = self._judging.n_images
        with repeatable():
            logits = predict(network, self._task.images[:n_images], BATCH_SIZE)
        return top1_error(logits, self._task.labels[:n_images])

    def _diverged(self, network: nn.Module) -> float:
        images, known = self._mixtures
        with repeatable():
            return divergence(predict(network, images, BATCH_SIZE), known)

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Losses of candidates, float64 (n_masks,)."""
        return self._measured(masks, "a generation", lambda mask: self.loss(self.candidate(mask)))

    def divergences(self, masks: PackedMasks) -> np.ndarray:
        """Divergences of candidates, float64 (n_masks,), whatever is minimised."""
        return self._measured(masks, "what each group loses alone", lambda mask: self._diverged(self.candidate(mask)))

    def _measured(self, masks: PackedMasks, what: str, measure: Callable[[np.ndarray], float]) -> np.ndarray:
        # Made before processes are forked, so that it is made once.
        _ = self._refit, self._mixtures
        return np.array(self._each(what, lambda i: measure(masks.unpack(i)), len(masks)), dtype=np.float64)

    def finish(self, masks: PackedMasks) -> tuple[list[dict[str, Tensor]], Scores]:
        """Build the networks of masks with all calibration images, and measure them.

        Returns:
            The state of each network, and its scores.
        """
        _ = self._last_refit, self._dense_log_probabilities

        def finish_one(i: int) -> tuple[dict[str, np.ndarray], float, float]:
            network = self.build(masks.unpack(i))
            return {key: value.cpu().numpy() for key, value in network.state_dict().items()}, *self.measure(network)

        found = self._each("finishing", finish_one, len(masks))
        states = [{key: torch.from_numpy(np.array(value)) for key, value in state.items()} for state, _, _ in found]
        return states, Scores(np.array([e for _, e, _ in found]), np.array([d for *_, d in found]))

    def _each(self, what: str, function: Callable[[int], Any], n: int) -> list[Any]:
        """Results of a function for each of n networks; what is being done is told from time to time."""
        telling = Telling(what)
        return run_in_processes(
            function, n, self._judging.n_processes, lambda done: telling("%d of %d networks", done, n)
        )
