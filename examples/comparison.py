"""The methods that the examples compare at equal evaluations: two phases, importance alone, and plain NSGA-II."""

from collections.abc import Mapping, Sequence

import numpy as np
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.flat import search_flat
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PruningProblem, run_algorithm
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.search.two_phase import search
from paretoprune.settings import Flat
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.operators.crossover.pntx import TwoPointCrossover
from pymoo.operators.mutation.bitflip import BitflipMutation
from pymoo.operators.sampling.rnd import BinaryRandomSampling

OURS, SORTED, FLAT, PYMOO = "two phases", "sorted by the score", "NSGA-II, spread densities", "NSGA-II of pymoo"


def compare(problem: Problem, score: np.ndarray, effort: Effort) -> dict[str, SearchResult]:
    """Run the two-phase method and those it is compared with; results by name, ours first."""
    return {
        OURS: search(problem, score, effort),
        SORTED: by_score_alone(problem, score, effort),
        FLAT: search_flat(problem, Flat(algorithm="nsga2"), effort),
        PYMOO: nsga2_of_pymoo(problem, effort),
    }


def by_score_alone(problem: Problem, score: np.ndarray, effort: Effort) -> SearchResult:
    """Masks of the units with the highest scores, with evenly spaced numbers of units."""
    n_units = problem.units.n_units
    ranks = np.argsort(np.argsort(-score, kind="stable"))
    counts = np.linspace(0, n_units, effort.evaluations).round()
    recorder = Recorder(problem, budget=effort.evaluations, stage="sorted")
    recorder(PackedMasks.pack_each((ranks < count for count in counts), n_units))
    recorder.close_generation()
    return recorder.result()


def nsga2_of_pymoo(problem: Problem, effort: Effort) -> SearchResult:
    """NSGA-II with pymoo's operators for bits: fair coins at first, two-point crossover, one bit flip on average."""
    recorder = Recorder(problem, budget=effort.evaluations, stage="pymoo")
    algorithm = NSGA2(
        pop_size=effort.population,
        sampling=BinaryRandomSampling(),
        crossover=TwoPointCrossover(),
        mutation=BitflipMutation(),
        eliminate_duplicates=True,
    )
    bits = PruningProblem(problem.units.n_units, PackedMasks.pack, recorder, bounds=(0, 1))
    run_algorithm(algorithm, bits, recorder, effort.seed)
    return recorder.result()


def table(title: str, rows: Mapping[str, Sequence[float]], *, digits: int = 4, gains: bool = False) -> str:
    """Format a row per method and a column per seed; with `gains` also how far the first row is above the others."""
    ours = np.array(next(iter(rows.values())))
    lines = [f"{title:<34}" + "".join(f"{f'seed {seed}':>10}" for seed in range(len(ours)))]
    lines[0] += f"{'ours above it by':>30}" if gains else ""
    for name, values in rows.items():
        line = f"{name:<34}" + "".join(f"{value:>10.{digits}f}" for value in values)
        if gains and name != OURS:
            line += "".join(f"{gain:>10.1%}" for gain in ours / np.array(values) - 1)
        lines.append(line)
    return "\n".join(lines)
