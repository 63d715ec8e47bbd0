"""What the examples compare with, at equal evaluations: NSGA-II on bits, without importance and without a corridor."""

from collections.abc import Callable, Mapping

import numpy as np
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.flat import search_flat
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.pymoo_adapter import PruningProblem, run_algorithm
from paretoprune.search.recorder import Recorder, SearchResult
from paretoprune.settings import Flat
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.operators.crossover.pntx import TwoPointCrossover
from pymoo.operators.mutation.bitflip import BitflipMutation
from pymoo.operators.sampling.rnd import BinaryRandomSampling

OURS, FLAT, PYMOO = "two phases", "NSGA-II, densities spread", "NSGA-II, pymoo's own"


def nsga2_spread(problem: Problem, effort: Effort) -> SearchResult:
    """NSGA-II with uniform crossover and bit flips, from random masks whose densities are spread from 0.02 to 1."""
    return search_flat(problem, Flat(algorithm="nsga2"), effort)


def nsga2_of_pymoo(problem: Problem, effort: Effort) -> SearchResult:
    """NSGA-II with what pymoo offers for binary variables: fair coins, two-point crossover, and one flip on average."""
    recorder = Recorder(problem, budget=effort.evaluations, stage="pymoo")
    algorithm = NSGA2(
        pop_size=effort.population,
        sampling=BinaryRandomSampling(),
        crossover=TwoPointCrossover(),
        mutation=BitflipMutation(),
        eliminate_duplicates=True,
    )
    n_units = problem.units.n_units
    run_algorithm(algorithm, PruningProblem(n_units, PackedMasks.pack, recorder, bounds=(0, 1)), recorder, effort.seed)
    return recorder.result()


def with_baselines(problem: Problem, ours: SearchResult, effort: Effort) -> dict[str, SearchResult]:
    """Ours and both baselines by name, the baselines with the effort that ours was given."""
    return {OURS: ours, FLAT: nsga2_spread(problem, effort), PYMOO: nsga2_of_pymoo(problem, effort)}


def table(title: str, rows: Mapping[str, np.ndarray], form: Callable[[float], str] = "{:.4f}".format) -> str:
    """Rows of numbers, one column a seed, and how far the first row is above each other one on average."""
    width = max(map(len, [*rows, title]))
    n_seeds = len(next(iter(rows.values())))
    head = f"{title:<{width}}  " + "  ".join(f"seed {seed:<3}" for seed in range(n_seeds)) + "  ours better by"
    first = next(iter(rows.values()))
    lines = [head]
    for i, (name, values) in enumerate(rows.items()):
        gain = f"{float(np.mean(first / values - 1)):+.1%}" if i else ""
        lines.append(f"{name:<{width}}  " + "  ".join(f"{form(v):<8}" for v in values) + f"  {gain}".rstrip())
    return "\n".join(lines)
