"""What every workflow step that computes does the same way: choose the device, read its inputs."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paretoprune.checkpoints import DenseNetwork
from paretoprune.datasets import ImageSet
from paretoprune.evaluation import PopulationEvaluator
from paretoprune.logs import logged
from paretoprune.masks import MaskLayout
from paretoprune.splits import LabelledImages, Splits
from paretoprune.statistics import LayerStatistics, load_statistics


@contextmanager
def step(name: str, log_file: str, threads: int = 1, gpus: int = 0) -> Iterator[tuple[logging.Logger, torch.device]]:
    """Run a step with logging, on the threads and the GPU that were granted.

    Args:
        name: Shown before each line in the terminal.
        log_file: Gets every line, see `paretoprune.logs.logged`.
        threads: CPU threads for torch.
        gpus: Granted GPUs; 0 means the CPU, also on a machine that has a GPU.

    Yields:
        The logger and the device to compute on.
    """
    with logged(name, log_file) as logger:
        torch.set_num_threads(max(1, threads))
        device = torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")
        if gpus and device.type == "cpu":
            logger.warning("a GPU was granted but torch finds none; computing on the CPU")
        if device.type == "cuda":
            # Otherwise convolutions round to TF32 where float32 is asked for, and trainings cannot be repeated.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        # User factories are imported from the folder where the workflow runs.
        sys.path.append(str(Path.cwd()))
        yield logger, device


def read_splits(images: str, splits: str, dense: DenseNetwork, *names: str) -> list[LabelledImages]:
    """Read some of the splits, normalised as the dense network expects."""
    image_set, indices = ImageSet.load(images), Splits.load(splits)
    return [LabelledImages.of(image_set, getattr(indices, name), dense.mean, dense.std) for name in names]


def read_statistics(inputs: Mapping[str, Any]) -> dict[str, LayerStatistics] | None:
    """The layer statistics among a step's input files; None where its repairs need none."""
    # Snakemake gives one file as it is, or a list of it, or an empty list.
    found = inputs.get("statistics") or []
    files = [found] if isinstance(found, str) else list(found)
    return load_statistics(files[0]) if files else None


def make_evaluator(
    dense: DenseNetwork,
    judged: LabelledImages,
    calibration: LabelledImages,
    settings: Mapping[str, Any],
    device: torch.device,
    **changed: Any,
) -> PopulationEvaluator:
    """An evaluator by the settings of `paretoprune.configuration.judging_settings`.

    `changed` ones go first; it may also hold other arguments of `PopulationEvaluator`.
    """
    keys = ("repair", "repair_images", "damping", "refine", "objective", "precision", "batch_size")
    chosen = {key: settings[key] for key in keys} | changed
    if chosen["batch_size"] == "auto":
        chosen["batch_size"] = None
    return PopulationEvaluator(
        dense.network,
        MaskLayout.of(dense.network, dense.exclude),
        judged.images,
        judged.labels,
        calibration_images=calibration.images,
        device=device,
        **chosen,
    )


def make_measurer(
    dense: DenseNetwork, judged: LabelledImages, device: torch.device, workers: int = 1
) -> PopulationEvaluator:
    """An evaluator that only measures finished networks, in float32."""
    return PopulationEvaluator(
        dense.network,
        MaskLayout.of(dense.network, dense.exclude),
        judged.images,
        judged.labels,
        repair="none",
        calibration_images=judged.images[:0],
        precision="float32",
        device=device,
        workers=workers,
    )
