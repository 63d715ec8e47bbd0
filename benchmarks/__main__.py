"""All benchmarks in one run: `make bench`, or `python -m benchmarks --help`.

Writes `results.json`, `results.md` and `results.png`. The evaluator's ratios are between medians of what ran in turn,
the engine's between medians of generations in processes of their own; a search runs once.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import engine, evaluator, figure, scaling, whole_search
from benchmarks.inputs import data_directory

FOLDER = Path(__file__).parent
_LOGGER = logging.getLogger("benchmarks")
# (depth, population, generations, images, calibration images, seed, candidates that stand for the plain search or None
# to run it). The plain implementation would take more than half an hour for the first.
SEARCHES = (
    (56, 40, 10, 500, 256, 0, 4),
    (20, 12, 8, 400, 128, 0, None),
    (20, 12, 8, 400, 128, 1, None),
)


def headline(results: dict[str, Any]) -> dict[str, float | None]:
    """The figures that are followed over time; each is a median or a ratio of medians.

    The engine's are those of guided NSGA-II at a million weights, the evaluator's and the search's ratio those of
    ResNet-56; the difference of hypervolumes is that of the searches that both implementations ran.
    """
    at = {(r["engine"], r["algorithm"], r["crossover"]): r for r in results["engine"] if r["n_weights"] == 1_000_000}
    peer, ours = at["pymoo", "nsga2", "two-point"], at["guided", "nsga2", "one-point"]
    (resnet56,) = (row for row in results["evaluator"] if row["depth"] == 56)
    differences = [r["hypervolume_difference"] for r in results["search"] if "hypervolume_difference" in r]
    return {
        "engine_speed_ratio": round(peer["seconds_per_generation"] / ours["seconds_per_generation"], 1),
        "engine_memory_ratio": round(ours["extra_peak_mb"] / peer["extra_peak_mb"], 4),
        "evaluator_ratio_usual": resnet56["ratio_usual"],
        "evaluator_ratio_tuned": resnet56["ratio_tuned"],
        "evaluator_share_of_floor": resnet56["share_of_peak"],
        "worker_scaling": results["workers"]["scaling"],
        "search_speed_ratio": median(r["speed_ratio"] for r in results["search"] if r["depth"] == 56),
        "search_hypervolume_difference": round(median(differences), 5) if differences else None,
    }


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="folder with cifar10-sample.tar and checkpoints/; without it untrained networks see noise",
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for results.json, .md and .png")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = data_directory(arguments.data)
    if data is None:
        _LOGGER.warning("no trained networks and images in %s: untrained networks see noise", arguments.data)
    start = time.perf_counter()

    def begin(what: str) -> None:
        _LOGGER.info("%4.0f s: %s", time.perf_counter() - start, what)

    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "data": "real images; ResNet-20 and -56 trained" if data else "untrained networks, noise",
    }
    begin("workers")
    results["workers"] = evaluator.measure_workers(56, 500, 8, 3, data)
    begin("evaluator")
    results["evaluator"] = evaluator.measure((20, 56, 110), 1000, 3, data)
    begin("engine")
    results["engine"] = engine.measure_all(engine.cases((100_000, 1_000_000, 10_000_000)))
    results["search"] = []
    for depth, population, generations, images, calibration, seed, n_plain in SEARCHES:
        begin(f"whole search, ResNet-{depth}, seed {seed}")
        results["search"].append(
            whole_search.measure(
                depth=depth,
                population=population,
                generations=generations,
                n_images=images,
                n_calibration=calibration,
                seed=seed,
                workers=2,
                data=data,
                n_plain=n_plain,
            )
        )
    begin("growth of cost")
    results["scaling"] = scaling.measure(data)
    results = {"headline": headline(results), "seconds": round(time.perf_counter() - start), **results}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "results.md").write_text(figure.table(results), encoding="utf-8")
    figure.draw(results, arguments.output / "results.png")
    begin(f"done; see {arguments.output}")
    print(json.dumps(results["headline"], indent=2))


if __name__ == "__main__":
    main()
