"""What every workflow step that searches reads, shows and writes the same way."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paretoprune.evaluation.task import Task
from paretoprune.files import write_csv, write_npz
from paretoprune.fronts import Front
from paretoprune.importance.layer_statistics import read_statistics
from paretoprune.importance.scores import flat_scores
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.search.recorder import HISTORY_COLUMNS
from paretoprune.tensors import load_tensors, save_networks
from paretoprune.workflow.inputs import read_splits


def read_task(inputs: Mapping[str, Any]) -> Task:
    """What is pruned, from a step's files `network`, `images`, `splits` and, where a repair asks, `statistics`."""
    dense = DenseNetwork.load(inputs["network"])
    search, calibration = read_splits(inputs["images"], inputs["splits"], dense, "search", "calibration")
    units = WeightUnits.of(dense.network, dense.exclude)
    return Task(dense.network, units, search.images, search.labels, calibration.images, read_statistics(inputs))


def read_scores(files: Sequence[str], units: WeightUnits) -> dict[str, np.ndarray]:
    """Importance scores by the names of their files, each float32 (n_weights,) in mask order."""
    return {Path(file).stem: flat_scores(load_tensors(file), units) for file in files}


def log_progress(logger: logging.Logger, budget: int) -> Callable[[dict[str, Any]], None]:
    """A progress callback for searches that writes about ten lines until `budget` evaluations are done."""
    next_at = 0

    def show(row: dict[str, Any]) -> None:
        nonlocal next_at
        if row["evaluations"] >= min(next_at, budget):
            next_at = row["evaluations"] + max(1, budget // 10)
            logger.info(
                "%s: %d of %d evaluations, hypervolume %.4f, %.0f s",
                row["stage"],
                row["evaluations"],
                budget,
                row["hypervolume"],
                row["seconds"],
            )

    return show


def write_published(front: Front, history: Sequence[Mapping[str, Any]], outputs: Mapping[str, Any]) -> None:
    """Write a published front: the output files `masks`, `networks` and `history`."""
    write_npz(outputs["masks"], front.arrays())  # `front.save` would put the networks beside it, under another name
    save_networks(outputs["networks"], front.states or [])
    write_csv(outputs["history"], history, HISTORY_COLUMNS)
