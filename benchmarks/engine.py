"""Time and memory of a generation: the packed engine of the searches against pymoo's own binary operators.

Both sides run pymoo's unmodified NSGA-II, ours MOEA/D as well, on populations of 100 masks. The objective is a real
trade-off and costs next to nothing, so the time is that of sampling, variation, duplicate elimination and survival:

- `pymoo`: as a user writes it, booleans with duplicate elimination; two-point crossover and pymoo's rate of bit flips
  (one per mask), or uniform crossover and the rate of `flat`;
- `flat`: the same on packed words, uniform crossover and bit flips (those of `search_flat`, a thousandth of all bits);
- `guided`: the moves of `search_corridor`, guided by two importance scores, and its one-point crossover, in a corridor
  of the middle half of all weights, with the layers of a ResNet-56.

Every case runs in a process of its own, so that peak memory can be measured. It counts from the first population on,
without the libraries and the inputs (importance scores, anchors).

    python benchmarks/engine.py [--n-weights 100000 1000000] [--output engine.json]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

# The package needs no installation.
PACKAGE = Path(__file__).resolve().parents[1] / "workflow" / "scripts"
sys.path.insert(0, str(PACKAGE))

import numpy as np  # noqa: E402
from paretoprune.fronts import non_dominated  # noqa: E402
from paretoprune.masks.packed import WORD_BITS, PackedMasks  # noqa: E402
from paretoprune.masks.units import PlainUnits, WeightUnits  # noqa: E402
from paretoprune.search.algorithms import ALGORITHMS  # noqa: E402
from paretoprune.search.corridor import Corridor  # noqa: E402
from paretoprune.search.flat import unguided_algorithm  # noqa: E402
from paretoprune.search.phase2 import guided_algorithm  # noqa: E402
from paretoprune.search.problem import Problem as SearchProblem  # noqa: E402
from paretoprune.search.pymoo_adapter import PruningProblem  # noqa: E402
from paretoprune.settings import Flat, Phase2  # noqa: E402
from pymoo.algorithms.moo.nsga2 import NSGA2  # noqa: E402
from pymoo.core.algorithm import Algorithm  # noqa: E402
from pymoo.core.problem import Problem  # noqa: E402
from pymoo.core.termination import NoTermination  # noqa: E402
from pymoo.operators.crossover.pntx import TwoPointCrossover  # noqa: E402
from pymoo.operators.crossover.ux import UniformCrossover  # noqa: E402
from pymoo.operators.mutation.bitflip import BitflipMutation  # noqa: E402
from pymoo.operators.sampling.rnd import BinaryRandomSampling  # noqa: E402

POPULATION = 100
SEED = 0
# Words of a mask that the made-up error depends on, spread over all layers.
N_DECISIVE = 200
# Those of the default configuration.
FLIP_RATE, SOFTNESS, FIRST_RATE, CROSSOVER_PROBABILITY = 0.001, 0.05, 0.02, 0.3


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        engine: `pymoo`, `flat` or `guided`.
        algorithm: `nsga2` or `moead`.
        crossover: How children mix their parents.
        n_weights: Bits of a mask.
        generations: Generations to measure after the first.
        population: Masks in a population.
        corridor: Share of the weights that are searched, for `guided` only.
    """

    engine: str
    algorithm: str
    crossover: str
    n_weights: int
    generations: int
    population: int = POPULATION
    corridor: float = 0.5


def cases(sizes: Sequence[int]) -> list[Case]:
    """All cases; pymoo's own operators only up to a million weights, where they take gigabytes."""
    found = []
    for n in sizes:
        if n <= 1_000_000:
            # Its defaults, and what `flat` does.
            found += [Case("pymoo", "nsga2", "two-point", n, 2), Case("pymoo", "nsga2", "uniform", n, 2)]
        generations = 20 if n <= 1_000_000 else 10
        for algorithm in ALGORITHMS:
            found.append(Case("flat", algorithm, "uniform", n, generations))
            found.append(Case("guided", algorithm, "one-point", n, generations))
    return found


def resnet56_layout(n_weights: int) -> WeightUnits:
    """Layers in the proportions of a ResNet-56 on CIFAR-10, scaled to `n_weights` in all."""
    widths = [16] * 19 + [32] * 18 + [64] * 18
    inputs = [3, *widths[:-1]]
    sizes = np.array([a * b * 9 for a, b in zip(inputs, widths, strict=True)] + [64 * 10])
    ends = np.rint(np.cumsum(sizes) / sizes.sum() * n_weights).astype(int)
    scaled = np.diff(ends, prepend=0).tolist()
    return WeightUnits(tuple(f"layer{i}" for i in range(len(scaled))), tuple((size,) for size in scaled))


class Objective:
    """A made-up error that costs next to nothing, and density.

    The error falls with the kept bits of some words, weighted at random, with diminishing returns.
    """

    def __init__(self, n_weights: int) -> None:
        rng = np.random.default_rng(SEED)
        self.problem = SearchProblem(PlainUnits(("all",), (n_weights,)), lambda masks: self(masks)[0][:, 0])
        self.words = np.linspace(0, n_weights // WORD_BITS - 1, N_DECISIVE).astype(int)
        self._weights = rng.exponential(size=N_DECISIVE)
        self._weights /= self._weights.sum() * WORD_BITS
        self._front = np.zeros((0, 2))

    def of(self, n_kept: np.ndarray, density: np.ndarray) -> np.ndarray:
        """Objectives (n, 2) from the kept weights in each of `words`, int (n, n_decisive), and density (n,)."""
        return np.column_stack([1 - np.sqrt(n_kept @ self._weights), density])

    def __call__(self, masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
        """Objectives (n, 2) of packed masks, and which of them join the front of all so far, as a `Recorder` says."""
        objectives = self.of(np.bitwise_count(masks.words[:, self.words]), masks.density)
        both = np.concatenate([self._front, objectives])
        members = non_dominated(both)
        joined = np.isin(np.arange(len(self._front), len(both)), members)
        self._front = both[members]
        return objectives, joined


class BooleanProblem(Problem):
    """The same objectives for pymoo's own operators, on booleans (n, n_weights)."""

    def __init__(self, n_weights: int) -> None:
        super().__init__(n_var=n_weights, n_obj=2, xl=0, xu=1, vtype=bool)
        self._objective = Objective(n_weights)
        self._bits = self._objective.words[:, None] * WORD_BITS + np.arange(WORD_BITS)

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = self._objective.of(x[:, self._bits].sum(axis=2), x.mean(axis=1))


def _prepare(case: Case) -> Callable[[], tuple[Algorithm, Problem]]:
    """Make the inputs of a case; the returned function makes the algorithm, its first population, and the problem."""
    n = case.n_weights
    if case.engine == "pymoo":
        crossover = TwoPointCrossover() if case.crossover == "two-point" else UniformCrossover()
        return lambda: (
            NSGA2(
                pop_size=case.population,
                sampling=BinaryRandomSampling(),
                crossover=crossover,
                mutation=BitflipMutation(prob_var=FLIP_RATE if case.crossover == "uniform" else None),
                eliminate_duplicates=True,
            ),
            BooleanProblem(n),
        )
    rng = np.random.default_rng(SEED)
    if case.engine == "flat":
        return lambda: (
            unguided_algorithm(
                Objective(n).problem, Flat(algorithm=case.algorithm, flip_rate=FLIP_RATE), case.population, rng
            ),
            PruningProblem.packed(Objective(n)),
        )
    layout = resnet56_layout(n)
    guides = [rng.random(n, dtype=np.float32) for _ in range(2)]
    light, heavy = guides[0] > 0.5 - case.corridor / 2, guides[0] > 0.5 + case.corridor / 2

    def make() -> tuple[Algorithm, Problem]:
        corridor = Corridor.between(light, heavy, layout)
        settings = Phase2(
            algorithm=case.algorithm,
            softness=SOFTNESS,
            first_rate=FIRST_RATE,
            crossover_probability=CROSSOVER_PROBABILITY,
        )
        rankings = [corridor.rank(scores) for scores in guides]
        algorithm, variation = guided_algorithm(
            corridor, rankings, PackedMasks.empty(n), settings, case.population, rng
        )
        return algorithm, PruningProblem.packed(Objective(n), variation.reward)

    return make


def _evolve(make: Callable[[], tuple[Algorithm, Problem]], generations: int) -> list[float]:
    """Seconds of the first population, with the making of the algorithm, and of each generation after it."""
    seconds, start = [], time.perf_counter()
    algorithm, problem = make()
    algorithm.setup(problem, termination=NoTermination(), seed=SEED)
    for _ in range(generations + 1):
        candidates = algorithm.ask()
        algorithm.evaluator.eval(problem, candidates)
        algorithm.tell(infills=candidates)
        # As in a search: pymoo remembers its last offspring, most of which are dead by now.
        candidates = algorithm.off = None
        end = time.perf_counter()
        seconds.append(end - start)
        start = end
    return seconds


def _memory(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def _population_mb(make: Callable[[], tuple[Algorithm, Problem]]) -> float:
    """Memory in MB of an algorithm with its first population."""
    before = _memory("VmRSS")
    algorithm, problem = make()
    algorithm.setup(problem, termination=NoTermination(), seed=SEED)
    population = algorithm.ask()
    assert len(population)
    return round(_memory("VmRSS") - before, 1)


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process, which must be a fresh one for its peak memory to mean anything.

    Returns:
        The case's fields, `seconds_first` (first population), `seconds_per_generation` (median), `extra_peak_mb`,
        `population_mb` (algorithm with its first population, None for pymoo) and `packed_mb` (the bits alone).
    """
    # A small run first: imports and compilation on first use are no part of the measurement.
    _evolve(_prepare(Case(case.engine, case.algorithm, case.crossover, 20_000, 1)), 1)
    make = _prepare(case)
    before = _memory("VmRSS")
    population_mb = _population_mb(make) if case.engine != "pymoo" else None
    first, *others = _evolve(make, case.generations)
    return asdict(case) | {
        "seconds_first": round(first, 4),
        "seconds_per_generation": round(median(others), 5),
        "population_mb": population_mb,
        "extra_peak_mb": round(_memory("VmHWM") - before, 1),
        "packed_mb": round(case.population * case.n_weights / 8e6, 1),
    }


def measure_all(chosen: Sequence[Case]) -> list[dict[str, Any]]:
    """Measure each case in a fresh process of one thread, one after the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    rows = []
    for case in chosen:
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
        answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(answer.stdout))
    return rows


def main() -> None:
    """Measure and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-weights", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--output", type=Path, help="write here instead of to stdout")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    found = measure(Case(**json.loads(arguments.case))) if arguments.case else measure_all(cases(arguments.n_weights))
    text = json.dumps(found, indent=None if arguments.case else 2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
