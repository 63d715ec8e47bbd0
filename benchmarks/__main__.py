"""All benchmarks in one run: `make bench`, or `python -m benchmarks --help`.

Writes `results.json`, `results.md` and `results.png`. Ratios of the evaluator are between medians of loops that ran in
turn. Ratios of the engine are between medians of generations, each case in a process of its own. A search runs once.
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
from benchmarks.whole_search import SearchCase

FOLDER = Path(__file__).parent
_LOGGER = logging.getLogger("benchmarks")
# The plain implementation would take more than half an hour for the first.
SEARCHES = (
    SearchCase(56, 40, 10, n_images=500, n_calibration=256, seed=0, n_plain=4),
    SearchCase(20, 12, 8, n_images=400, n_calibration=128, seed=0),
    SearchCase(20, 12, 8, n_images=400, n_calibration=128, seed=1),
)


def headline(results: dict[str, Any]) -> dict[str, float | None]:
    """The figures that are followed over time, each a median or a ratio of medians.

    Those of the engine are for guided NSGA-II at a million weights. Those of the evaluator and of the search's speed
    are for ResNet-56. The difference of hypervolumes is over the searches that both implementations ran.
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
    for case in SEARCHES:
        begin(f"whole search, ResNet-{case.depth}, seed {case.seed}")
        results["search"].append(whole_search.measure(case, workers=2, data=data))
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
