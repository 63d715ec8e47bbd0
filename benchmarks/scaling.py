"""How cost grows: of a candidate with depth and images, of a generation with population and corridor."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.task import Task
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.settings import Compute, Evaluating

from benchmarks.engine import Case, measure_all
from benchmarks.evaluator import DENSITY
from benchmarks.inputs import images_and_labels, resnet, side_by_side

DEPTHS = (20, 32, 44, 56, 110)
IMAGES = (125, 250, 500, 1000, 2000)
POPULATIONS = (25, 50, 100, 200)
CORRIDORS = (0.1, 0.25, 0.5, 0.9)
N_WEIGHTS, GENERATIONS = 1_000_000, 10


def _candidate(depth: int, n_images: int, data: Path | None) -> float:
    """Seconds of one candidate on one core, repaired on 128 images."""
    torch.set_num_threads(1)
    images, labels = images_and_labels(n_images + 128, data)
    network = resnet(depth, data)
    layout = WeightUnits.of(network)
    task = Task(network, layout, images[:n_images], labels[:n_images], images[n_images:])
    evaluate = PopulationEvaluator(task, Evaluating(repair_images=None), Compute())
    mask = PackedMasks.pack(np.random.default_rng(0).random(layout.n_weights) < DENSITY)
    return side_by_side({"candidate": lambda: evaluate(mask)}, 3)["candidate"]


def _generations(cases: list[Case]) -> list[float]:
    return [row["seconds_per_generation"] for row in measure_all(cases)]


def measure(data: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Rows by what grows: `depth`, `images`, `population` and `corridor`, each with its value and the seconds."""
    by_population = [Case("guided", "nsga2", "one-point", N_WEIGHTS, GENERATIONS, population=n) for n in POPULATIONS]
    by_corridor = [Case("guided", "nsga2", "one-point", N_WEIGHTS, GENERATIONS, corridor=share) for share in CORRIDORS]
    found = {
        "depth": zip(DEPTHS, [_candidate(depth, 500, data) for depth in DEPTHS], strict=True),
        "images": zip(IMAGES, [_candidate(20, n, data) for n in IMAGES], strict=True),
        "population": zip(POPULATIONS, _generations(by_population), strict=True),
        "corridor": zip(CORRIDORS, _generations(by_corridor), strict=True),
    }
    return {
        key: [{"value": value, "seconds": round(seconds, 5)} for value, seconds in rows] for key, rows in found.items()
    }
