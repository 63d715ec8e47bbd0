"""A whole search, both phases, against the plain implementation: same networks, images, seed and budget.

By itself for other sizes than those of `make bench`, for instance one of hours for the plain implementation:

    PYTHONPATH=workflow/scripts python -m benchmarks.whole_search --population 40 --generations 20 --images 1000 \
        --calibration 256 --plain-sample 4
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front
from paretoprune.importance.allocation import starting_allocations
from paretoprune.importance.scores import compute_importance, flat_scores
from paretoprune.masks.units import WeightUnits
from paretoprune.search.corridor import Corridor, choose_anchors
from paretoprune.search.phase2 import search_corridor
from paretoprune.search.problem import Effort, Evaluator, Problem
from paretoprune.search.recorder import SearchResult
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Compute, Evaluating, Phase1, Phase2

from benchmarks import plain
from benchmarks.inputs import data_directory, images_and_labels, resnet

SCORES = ("magnitude", "lamp", "fisher")
# Those that follow one of these scores; `elimination` would need layer statistics.
STARTS = ("uniform", "global_magnitude", "lamp", "erdos_renyi_kernel")
N_GRADIENT_IMAGES = 64
MOVES = Phase2(softness=0.05, first_rate=0.02, crossover_probability=0.3)
PREFIX_CACHE_MB = 2000


def start_densities(population: int) -> list[float]:
    """As many densities as let the classical allocations fill two thirds of a population."""
    return np.geomspace(0.8, 0.05, max(2, population * 2 // (3 * len(STARTS)))).tolist()


def both_phases(
    problem: Problem, search_corridor: Callable[..., SearchResult], scores: dict[str, np.ndarray], effort: Effort
) -> tuple[SearchResult, list[float]]:
    """Half of the evaluations for each phase; the result, and the seconds of each phase."""
    start = time.perf_counter()
    assert isinstance(problem.units, WeightUnits)
    first = effort.evaluations // 2
    before = search_thresholds(
        problem,
        scores["magnitude"],
        starting_allocations(STARTS, start_densities(effort.population), scores, problem.units),
        Phase1(),
        replace(effort, evaluations=first),
    )
    middle = time.perf_counter()
    light, heavy = choose_anchors(before.front, 0.0, 0.9, light_tolerance=0.01, heavy_tolerance=0.8)
    corridor = Corridor.around(before.front.masks.select([light, heavy]), problem.units)
    guides = [scores["magnitude"], scores["fisher"]]
    left = replace(effort, evaluations=effort.evaluations - first)
    found = search_corridor(problem, [corridor], guides, before, MOVES, left)
    return found, [middle - start, time.perf_counter() - middle]


def evaluate_again(front: Front, evaluate: Evaluator) -> Front:
    """The same masks evaluated by another evaluator, without those that others now dominate."""
    evaluated = Front(front.masks, np.column_stack([evaluate(front.masks), front.density]), front.stages)
    return Front.empty(front.masks.n_units).merge(evaluated)


@dataclass(frozen=True)
class SearchCase:
    """A search to measure.

    Attributes:
        depth: Of the ResNet.
        population: Candidates in a population.
        generations: Generations of both phases together.
        n_images: Images that candidates are evaluated on.
        n_calibration: Images that they are repaired on.
        seed: Of the search.
        n_plain: None to run the plain search. A number to evaluate so many of our candidates the plain way, one by one,
            and to extrapolate to all of them.
        precision: Precision of our search.
    """

    depth: int
    population: int
    generations: int
    n_images: int
    n_calibration: int
    seed: int
    n_plain: int | None = None
    precision: str = "auto"


def measure(case: SearchCase, workers: int, data: Path | None) -> dict[str, Any]:
    """Search once with each implementation.

    The time of each starts with the dense network in memory and ends with a front of at most `population` members,
    evaluated in float32.

    Args:
        case: What is searched.
        workers: Processes of ours, and threads of the plain implementation.
        data: Folder of trained networks and real images, or None.

    Returns:
        Settings, seconds, `speed_ratio`, hypervolumes of both fronts under the plain evaluator, and their difference.
    """
    torch.set_num_threads(1)
    everything, all_labels = images_and_labels(case.n_images + case.n_calibration, data)
    images, labels, calibration = everything[: case.n_images], all_labels[: case.n_images], everything[case.n_images :]
    network = resnet(case.depth, data)
    layout = WeightUnits.of(network)
    sample = images[:N_GRADIENT_IMAGES], labels[:N_GRADIENT_IMAGES]
    scores = {
        name: flat_scores(compute_importance(name, network, layout, *sample, case.seed), layout) for name in SCORES
    }
    effort = Effort(case.population * case.generations, case.population, case.seed)
    evaluating = Evaluating(repair="batchnorm", repair_images=None, objective="divergence")
    compute = Compute(precision=case.precision, workers=workers, prefix_cache_mb=PREFIX_CACHE_MB)

    start = time.perf_counter()
    task = Task(network, layout, images, labels, calibration)
    evaluate = PopulationEvaluator(task, evaluating, compute)
    prepared = time.perf_counter() - start
    ours, phases = both_phases(Problem(layout, evaluate), search_corridor, scores, effort)
    evaluate.close()
    exact = PopulationEvaluator(task, evaluating, replace(compute, precision="float32", prefix_cache_mb=0))
    front = evaluate_again(ours.front, exact).thinned(case.population)
    exact.close()
    seconds_ours = time.perf_counter() - start

    # The plain implementation has as many cores: torch's eager mode uses them by threads.
    torch.set_num_threads(workers)
    usual = plain.PlainEvaluator(task, repair=evaluating.repair, objective=evaluating.objective)
    hypervolume = evaluate_again(front, usual).hypervolume()
    row: dict[str, Any] = {
        "depth": case.depth,
        **asdict(effort),
        "images": case.n_images,
        "calibration": case.n_calibration,
        "workers": workers,
        "precision": evaluate.precision,
        "seconds_ours": round(seconds_ours, 2),
        "seconds_preparation": round(prepared, 2),
        "seconds_phase1": round(phases[0], 2),
        "seconds_phase2": round(phases[1], 2),
        "share_of_images_seen": round(evaluate.n_images_seen / (case.n_images * effort.evaluations), 3),
        "share_of_candidates_continued": round(evaluate.prefixes.hits / effort.evaluations, 3),
        "hypervolume_ours": round(hypervolume, 5),
        "plain": "run" if case.n_plain is None else f"extrapolated from {case.n_plain} candidates",
    }
    start = time.perf_counter()  # the plain evaluator has evaluated before, so it is warm
    if case.n_plain is None:
        theirs, _ = both_phases(Problem(layout, usual), plain.search_corridor, scores, effort)
        seconds_plain = time.perf_counter() - start
        theirs_hypervolume = theirs.front.thinned(case.population).hypervolume()
        row |= {
            "hypervolume_plain": round(theirs_hypervolume, 5),
            "hypervolume_difference": round(hypervolume - theirs_hypervolume, 5),
        }
    else:
        usual(front.masks.select(np.linspace(0, len(front) - 1, case.n_plain).astype(int)))
        seconds_plain = (time.perf_counter() - start) / case.n_plain * effort.evaluations
    torch.set_num_threads(1)
    return row | {"seconds_plain": round(seconds_plain, 2), "speed_ratio": round(seconds_plain / seconds_ours, 3)}


def main() -> None:
    """Search once with each implementation and print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="see python -m benchmarks --help")
    for name, default in (("depth", 56), ("population", 12), ("generations", 8), ("images", 250), ("calibration", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="auto", help="precision of our search")
    parser.add_argument(
        "--plain-sample", type=int, help="evaluate so many candidates the plain way instead of searching"
    )
    arguments = parser.parse_args()
    case = SearchCase(
        depth=arguments.depth,
        population=arguments.population,
        generations=arguments.generations,
        n_images=arguments.images,
        n_calibration=arguments.calibration,
        seed=arguments.seed,
        n_plain=arguments.plain_sample,
        precision=arguments.precision,
    )
    row = measure(case, arguments.workers, data_directory(arguments.data))
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
