"""Evaluators and finishers of the small networks, which several tests share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.task import Task
from paretoprune.evaluation.workers import can_fork
from paretoprune.importance.layer_statistics import LayerStatistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.refit import Refit
from paretoprune.settings import Compute, Evaluating
from small_networks import calibration, digits, some_masks
from torch import Tensor, nn

N_EVALUATED = 300
SHARED = pytest.mark.skipif(not can_fork(), reason="worker processes are forked, which only Linux does well")


def search_split() -> tuple[Tensor, Tensor]:
    """Images and labels that small networks are evaluated on."""
    images, labels = digits()
    return images[1000 : 1000 + N_EVALUATED], labels[1000 : 1000 + N_EVALUATED]


def task_of(
    network: nn.Module, statistics: Mapping[str, LayerStatistics] | None = None, exclude: Sequence[str] = ()
) -> Task:
    """A network with the images of the tests."""
    return Task(network, WeightUnits.of(network, exclude), *search_split(), calibration(), statistics)


def settings_of(repair: str, options: Mapping[str, Any]) -> tuple[Evaluating, Compute]:
    """Settings by their names, in float32 and batches of 64 images where nothing else is said."""
    chosen = {"repair": repair, "repair_images": None, "precision": "float32", "batch_size": 64, **options}
    return Evaluating.of(chosen), Compute.of(chosen)


def evaluator(
    network: nn.Module,
    repair: str = "batchnorm",
    *,
    statistics: Mapping[str, LayerStatistics] | None = None,
    **options: Any,
) -> PopulationEvaluator:
    """An evaluator by the names of settings."""
    return PopulationEvaluator(task_of(network, statistics), *settings_of(repair, options))


def finisher(
    network: nn.Module,
    repair: str = "batchnorm",
    *,
    exclude: Sequence[str] = (),
    refit: Refit | None = None,
    **options: Any,
) -> Finisher:
    """A finisher by the names of settings."""
    return Finisher(task_of(network, exclude=exclude), *settings_of(repair, options), refit)


def unpacked(masks: PackedMasks) -> list[np.ndarray]:
    """Each mask as bool (n_weights,)."""
    return [masks.unpack(i) for i in range(len(masks))]


def many_masks(network: nn.Module) -> PackedMasks:
    """Parents, and children that differ from them in the last layers only, some of them twice."""
    layout, rng = WeightUnits.of(network), np.random.default_rng(5)
    rows = unpacked(some_masks(network))
    for parent in (2, 4, 5):
        for first in (layout.n_groups - 1, layout.n_groups - 2, layout.n_groups // 2):
            child = rows[parent].copy()
            later = np.arange(layout.n_weights) >= layout.offsets[first]
            child[later] ^= rng.random(int(later.sum())) < 0.1
            rows.append(child)
    return PackedMasks.pack(np.array([*rows, rows[4], rows[-1]]))
