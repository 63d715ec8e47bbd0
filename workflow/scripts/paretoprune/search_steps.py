"""What every workflow step that searches does the same way: make a judge, read scores, show progress, publish."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretoprune.checkpoints import DenseNetwork, load_tensors
from paretoprune.evaluation import PopulationEvaluator
from paretoprune.files import write_csv
from paretoprune.importance import flat_scores
from paretoprune.masks import MaskLayout
from paretoprune.search import HISTORY_COLUMNS, SearchResult, judge_again
from paretoprune.steps import make_evaluator, read_splits


def make_search_evaluator(
    inputs: Mapping[str, Any], settings: Mapping[str, Any], device: torch.device, **changed: Any
) -> PopulationEvaluator:
    """A judge on the search split, from a step's input files `network`, `images` and `splits`.

    Settings are those of `paretoprune.steps.make_evaluator`; `changed` ones go first. It may also hold other arguments
    of `paretoprune.evaluation.PopulationEvaluator`.
    """
    dense = DenseNetwork.load(inputs["network"])
    search, calibration = read_splits(inputs["images"], inputs["splits"], dense, "search", "calibration")
    return make_evaluator(dense, search, calibration, settings, device, **changed)


def read_scores(files: Sequence[str], layout: MaskLayout) -> dict[str, np.ndarray]:
    """Importance scores by the names of their files, each float32 (n_weights,) in mask order."""
    return {Path(file).stem: flat_scores(load_tensors(file), layout) for file in files}


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


def publish(
    found: SearchResult,
    evaluate: PopulationEvaluator,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Thin a front to `front_size` and write the output files `masks` and `history`.

    A front that was searched in another precision than float32 is judged again in float32 first, in as many processes.
    """
    front = found.front
    evaluate.close()
    if evaluate.precision != "float32":
        changed = {"precision": "float32", "workers": evaluate.n_workers}
        with make_search_evaluator(inputs, settings, device, **changed) as exact:
            front = judge_again(front, exact)
    front.thinned(settings["front_size"]).save(outputs["masks"])
    write_csv(outputs["history"], found.history, HISTORY_COLUMNS)
