"""Choosing how to compute: the fastest way that gives the answers of the plain one, checked on real images.

Fused where the network can be traced (`evaluation.fused`), layer by layer otherwise (`evaluation.layerwise`); in
bfloat16 where the machine computes in it.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.copies import copied
from paretoprune.devices import computes_bfloat16, default_batch_size, out_of_memory, repeatable
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import top1_error
from paretoprune.evaluation.prunable import PrunableNetwork
from paretoprune.evaluation.task import Task
from paretoprune.evaluation.workers import can_fork
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import channels_last
from paretoprune.networks.tracing import NotTraceableError
from paretoprune.repair.refit import Refit
from paretoprune.repair.repairs import repair_named
from paretoprune.settings import Compute, Evaluating

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Images on which a way to compute is compared with float32, layer by layer; and how far it may be off: share of
# answers that differ, and difference of the error. One image more than that is always allowed.
N_CHECKED = 256
TOLERANCES = {torch.float32: (0.01, 0.005), torch.bfloat16: (0.05, 0.02)}
# Density of the magnitude-pruned network that is compared beside the dense one, and that tells which images are hard.
CHECKED_DENSITY = 0.3
# Images per forward pass of the comparison.
CHECKED_BATCH = 64
_LOGGER = logging.getLogger("paretoprune")
_Network = TypeVar("_Network", bound=FusedNetwork | LayerwiseNetwork)


def precision_of(compute: Compute) -> torch.dtype:
    """The type that is asked for; behind `auto` bfloat16 where the device computes in it.

    Raises:
        ValueError: There is no such precision.
    """
    if compute.precision not in (*PRECISIONS, "auto"):
        raise ValueError(f"expected a precision among {', '.join(PRECISIONS)} and auto, found '{compute.precision}'")
    if compute.precision == "auto":
        return torch.bfloat16 if computes_bfloat16(torch.device(compute.device)) else torch.float32
    return PRECISIONS[compute.precision]


def batch_size_of(compute: Compute, images: Tensor) -> int:
    """Images per forward pass; behind `auto` as many as suit their size and the device."""
    if isinstance(compute.batch_size, str):
        return default_batch_size(images, torch.device(compute.device))
    return compute.batch_size


def n_processes(compute: Compute) -> int:
    """Processes to compute in: those that are granted on a CPU that can share them, otherwise one."""
    on_cpu = torch.device(compute.device).type == "cpu"
    return max(1, compute.workers) if on_cpu and can_fork() else 1


def make_refit(task: Task, evaluating: Evaluating, device: torch.device) -> Refit | None:
    """What re-fits the weights of candidates; None unless the repair does.

    Raises:
        ValueError: There is no such repair.
    """
    if not repair_named(evaluating.repair).refits:
        return None
    statistics = task.statistics
    if statistics is None:
        with repeatable():
            # Which positions are looked at is no part of a search's luck.
            statistics = collect_statistics(task.network, task.units, task.calibration, seed=0, device=device)
    # A copy: weights that somebody changes later on are not those of the statistics.
    return Refit(copied(task.network), task.units, statistics, damping=evaluating.damping, device=device)


def place(images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Images on a device, in a type, in the memory layout that convolutions like best."""
    return channels_last(images.to(device, dtype))


def magnitude_mask(network: nn.Module, units: WeightUnits) -> np.ndarray:
    """bool (n_weights,): the largest weights of each layer, as many as `CHECKED_DENSITY` says."""
    parameters = dict(network.named_parameters())
    parts = []
    for name, size in zip(units.names, units.sizes.tolist(), strict=True):
        magnitudes = parameters[name].detach().abs().reshape(-1).cpu().numpy()
        least = np.partition(magnitudes, int(size * (1 - CHECKED_DENSITY)))[int(size * (1 - CHECKED_DENSITY))]
        parts.append(magnitudes >= least)
    return np.concatenate(parts)


def answers(network: PrunableNetwork, images: Tensor, batch_size: int, mask: np.ndarray | None) -> Tensor:
    """Logits of all images under a mask, float32 (n, n_classes).

    Args:
        network: What takes the mask.
        images: Images (n, c, h, w), on its device and in its type.
        batch_size: Images per forward pass.
        mask: bool (n_weights,); None keeps everything.
    """
    kept = torch.ones(network.layout.n_weights, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
    network.prepare(kept.to(images.device))
    return torch.cat([network.answer(batch) for batch in images.split(batch_size)])


@dataclass(frozen=True)
class Computation:
    """A way to compute.

    Attributes:
        network: Takes masks and gives answers.
        dtype: Type of its weights and activations.
    """

    network: PrunableNetwork
    dtype: torch.dtype


class Backends:
    """The ways to compute pruned versions of one dense network, all after the same repair.

    Args:
        task: The network and the images; the network is copied.
        evaluating: The repair.
        device: Where to compute.
        refit: What re-fits the weights, from `make_refit`.
    """

    def __init__(self, task: Task, evaluating: Evaluating, device: torch.device, refit: Refit | None) -> None:
        self.network = copied(task.network)
        self.network.eval()
        self._task, self._repair, self._device, self._refit = task, evaluating.repair, device, refit
        self._calibration = task.calibration[: evaluating.repair_images]

    def prepared(self, kind: type[_Network], dtype: torch.dtype) -> _Network:
        """The dense network, ready to take masks in one of the ways."""
        return kind(
            self.network,
            self._task.units,
            place(self._task.images[:2], self._device, dtype),
            repair=self._repair,
            calibration_images=place(self._calibration, self._device, dtype),
            refit=self._refit,
        )

    @cached_property
    def plain(self) -> LayerwiseNetwork:
        """The plain way: float32, layer by layer."""
        return self.prepared(LayerwiseNetwork, torch.float32)

    def choose(self, dtype: torch.dtype) -> Computation:
        """The fastest way that agrees with the plain one, in a type or, where that does not agree, in float32.

        Raises:
            ValueError: The dense network answers anything that is not finite.
        """
        checked = place(self._task.images[:N_CHECKED], self._device, torch.float32)
        labels = self._task.labels[:N_CHECKED].to(self._device)
        # A way may be right for the dense network and wrong for pruned ones.
        masks = [None, magnitude_mask(self.network, self._task.units)]
        expected = [answers(self.plain, checked, CHECKED_BATCH, mask) for mask in masks]
        if not bool(torch.isfinite(expected[0]).all()):
            raise ValueError(
                "the dense network's answers are not finite; check the checkpoint and its input normalisation"
            )
        ways: list[tuple[type[FusedNetwork] | type[LayerwiseNetwork], torch.dtype]] = [(FusedNetwork, dtype)]
        if dtype != torch.float32:
            ways.append((LayerwiseNetwork, dtype))
        for kind, tried in ways:
            name = f"{'fused' if kind is FusedNetwork else 'layer-by-layer'} {str(tried).removeprefix('torch.')} path"
            try:
                network = self.prepared(kind, tried)
                found = [answers(network, checked.to(tried), CHECKED_BATCH, mask) for mask in masks]
            except NotTraceableError as error:
                _LOGGER.info("the %s does not take this network: %s", name, error)
                continue
            except Exception as error:  # the plain way has run, so the fault is not the network's
                if out_of_memory(error):
                    raise
                _LOGGER.warning(
                    "the %s fails on this network: %s", name, str(error).splitlines()[0] if str(error) else error
                )
                continue
            if _agrees(name, found, expected, labels, TOLERANCES[tried]):
                return Computation(network, tried)
        _LOGGER.info("candidates are evaluated in float32, layer by layer")
        return Computation(self.plain, torch.float32)


def _agrees(
    name: str, found: list[Tensor], expected: list[Tensor], labels: Tensor, tolerances: tuple[float, float]
) -> bool:
    """Whether answers are near enough to those of the plain way; says so."""
    differing = max(float((a.argmax(1) != b.argmax(1)).double().mean()) for a, b in zip(found, expected, strict=True))
    shifts = [top1_error(a, labels) - top1_error(b, labels) for a, b in zip(found, expected, strict=True)]
    shift = max(shifts, key=abs)
    image = 1.01 / len(labels)
    good = differing <= tolerances[0] + image and abs(shift) <= tolerances[1] + image
    _LOGGER.log(
        logging.INFO if good else logging.WARNING,
        "%s against float32 layer by layer, dense and pruned, on %d images: %.1f %% of the answers agree, "
        "the error is %+.2f points off%s",
        name,
        len(labels),
        100 * (1 - differing),
        100 * shift,
        "" if good else "; that is too much, and it is not used",
    )
    return good
