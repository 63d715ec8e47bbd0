"""Smaller networks of equal multiply-adds by several tools: `make bench-channels`, or `python -m benchmarks.channels`.

Writes `channels.json`, `channels.md` and `channels.png`. Parts that are not measured again keep their rows.
"""

import argparse
import logging
from collections.abc import Collection, Iterable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from paretoprune.structured.judging import Judging

from benchmarks.channels import choices, measuring, report
from benchmarks.channels.choices import Choice
from benchmarks.channels.ours import Published
from benchmarks.channels.peers import failure_without_ignoring
from benchmarks.channels.results import Results
from benchmarks.channels.subject import Subject, experiment, of_results, prepared

FOLDER = Path(__file__).parents[1]
NETWORKS = {"resnet20": 20, "resnet56": 56}
PEERS, OWN, STARTS, SEARCHED, FRONT = PARTS = ("peers", "own", "starts", "searched", "front")
# Layer that makes the classes.
CLASSES = "linear"
LEVELS = (0.3, 0.5, 0.6)
# After which candidates are judged; without one, all of them would be guesses.
SEARCHED_REPAIRS = ("batchnorm", "reconstruct")
# As a search judges its candidates, see `settings.Searching`.
N_REPAIR_IMAGES = 384


def about(subject: Subject) -> dict[str, Any]:
    """What is written of a subject."""
    dense = measuring.accuracy(subject.network, subject.test)
    return {
        "fingerprint": subject.fingerprint,
        "torch": torch.__version__,
        "torch_pruning": version("torch-pruning"),
        "n_test": len(subject.test),
        "n_calibration": len(subject.calibration),
        "n_search": len(subject.search),
        "dense": dense,
        "without_ignored_layers": failure_without_ignoring(subject.network, subject.search.images[:1], CLASSES),
    }


def main() -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.channels", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="cifar10-sample.tar and checkpoints/")
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument(
        "--front", type=Path, help="folder of a method's results with masks.npz; its images and network are used"
    )
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="shares of multiply-adds to remove")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=(PEERS, OWN, FRONT), help="what is measured again")
    parser.add_argument(
        "--candidates", type=int, help="tried for each importance, repair and level; all levels: our evaluations"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for channels.json, .md and .png")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # One thread, as one process of a search has it.
    torch.set_num_threads(1)
    subject = None if arguments.front is None else of_results(arguments.front)
    subject = subject or prepared(NETWORKS[arguments.network], arguments.data)
    results = Results(arguments.output, subject.dense.architecture.name, about(subject))
    levels = sorted(arguments.levels)
    if PEERS in arguments.parts:
        measure_one_shot(subject, results, levels, PEERS, choices.peers(subject, levels))
    if OWN in arguments.parts or STARTS in arguments.parts:
        measure_own(subject, results, levels, arguments.parts)
    if SEARCHED in arguments.parts:
        (method,) = experiment()["method_settings"].values()
        n_candidates = arguments.candidates or round(method["evaluations"] / len(levels))
        measure_searched(subject, results, levels, n_candidates)
    if FRONT in arguments.parts and arguments.front is not None:
        measure_front(subject, results, levels, arguments.front)
    report.write(results.path)


def measure_one_shot(
    subject: Subject, results: Results, levels: list[float], part: str, found: Iterable[Choice]
) -> None:
    """What is chosen at once, under each repair."""
    rows: list[measuring.Row] = []
    for row in measuring.measure(subject, list(found)):
        rows.append(row)
        results.replace(part, rows, levels)


def measure_own(subject: Subject, results: Results, levels: list[float], parts: Collection[str]) -> None:
    """What follows from our order without a search."""
    order = choices.our_order(subject)
    if OWN in parts:
        both = choices.uniform(subject, order, levels), choices.least_loss(subject, order, levels)
        measure_one_shot(subject, results, levels, OWN, chain(*both))
    if STARTS in parts:
        measure_one_shot(subject, results, levels, STARTS, choices.least_measured_loss(subject, order, levels))


def measure_searched(subject: Subject, results: Results, levels: list[float], n_candidates: int) -> None:
    """The best of as many allocations of torch-pruning's importances as our search evaluates."""
    rows: list[measuring.Row] = []
    found = list(choices.peers(subject, levels))
    n_images = experiment()["search"]["candidate_images"]
    for repair in reversed(SEARCHED_REPAIRS):
        judging = Judging(repair, n_repair_images=N_REPAIR_IMAGES, n_images=n_images)
        best = list(choices.searched(subject, found, n_candidates, judging))
        rows += measuring.measure(subject, best, [repair])
        results.replace(SEARCHED, rows, levels)


def measure_front(subject: Subject, results: Results, levels: list[float], folder: Path) -> None:
    """The channels of our front's members under each repair; re-fitted they are as they were published."""
    measure_one_shot(subject, results, levels, FRONT, Published.read(folder, subject).choices(levels))


if __name__ == "__main__":
    main()
