"""The evolutionary algorithms that can search packed genomes, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from pymoo.algorithms.moo.moead import ParallelMOEAD
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.algorithm import Algorithm as PymooAlgorithm
from pymoo.core.population import Population
from pymoo.decomposition.tchebicheff import Tchebicheff
from pymoo.util.ref_dirs import get_reference_directions

from paretoprune.masks.genomes import Genome
from paretoprune.search.pymoo_adapter import PackedCrossover, PackedDuplicates, PackedMutation, individuals

# Words of two parents to those of a child.
Cross = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
# Genomes to changed ones.
Vary = Callable[[Sequence[Genome], np.random.Generator], Sequence[Genome]]


@dataclass(frozen=True)
class Operators:
    """How children are made.

    Attributes:
        cross: Of two parents.
        vary: Afterwards.
        crossover_probability: Probability that a child has two parents.
    """

    cross: Cross
    vary: Vary
    crossover_probability: float

    def pymoo(self) -> dict[str, Any]:
        """As arguments of pymoo's algorithms."""
        return {
            "crossover": PackedCrossover(self.cross, self.crossover_probability),
            "mutation": PackedMutation(self.vary),
        }


def handing_over(first: list[Genome]) -> Callable[..., Population]:
    """pymoo's sampling of a given first population, which empties the list."""

    # pymoo would hold an array that it is given, and with it all genomes that die out, until the end.
    def sample(*args: Any, **kwargs: Any) -> Population:
        x = individuals(first)
        first.clear()
        return Population.new("X", x)

    return sample


def reference_directions(n_objectives: int, population: int) -> np.ndarray:
    """Evenly spread trade-offs, at most as many as the population where there are more than two objectives.

    Args:
        n_objectives: At least 2.
        population: At least `n_objectives`.

    Returns:
        float (n_directions, n_objectives), each adding up to 1.

    Source:
        Das and Dennis, "Normal-boundary intersection", 1998, in pymoo.
    """
    n_partitions = population - 1
    while n_partitions > 1 and comb(n_partitions + n_objectives - 1, n_objectives - 1) > population:
        n_partitions -= 1
    found: np.ndarray = get_reference_directions("uniform", n_objectives, n_partitions=n_partitions)
    return found


def nsga2(
    population: int, first: list[Genome], operators: Operators, n_objectives: int, **changed: Any
) -> PymooAlgorithm:
    """NSGA-II; with more than two objectives NSGA-III, which spreads its members along reference directions.

    Args:
        population: Size of the population.
        first: The first population; the list is emptied when the algorithm takes it.
        operators: How children are made.
        n_objectives: Loss and costs.
        changed: Further arguments of pymoo's NSGA2.

    Source:
        Deb et al., 2002, and Deb and Jain, 2014; both in pymoo.
    """
    common: dict[str, Any] = {
        "pop_size": population,
        "sampling": handing_over(first),
        "eliminate_duplicates": PackedDuplicates(),
        **operators.pymoo(),
    }
    if n_objectives > 2 and not changed:
        return NSGA3(ref_dirs=reference_directions(n_objectives, population), **common)
    return NSGA2(**common, **changed)


def moead(population: int, first: list[Genome], operators: Operators, n_objectives: int) -> PymooAlgorithm:
    """MOEA/D with Tchebycheff decomposition; arguments as for `nsga2`.

    Source:
        Zhang and Li, 2007, in pymoo.
    """
    directions = reference_directions(n_objectives, population)
    # One member for each direction, from the whole range where there are more.
    first[:] = [first[i] for i in np.linspace(0, len(first) - 1, min(len(directions), len(first))).round().astype(int)]
    # pymoo would take another decomposition where there are more than two objectives, of which `search.survival` knows
    # no bounds.
    return ParallelMOEAD(
        ref_dirs=directions,
        n_neighbors=max(2, min(20, population // 3)),
        decomposition=Tchebicheff(),
        sampling=handing_over(first),
        **operators.pymoo(),
    )


@dataclass(frozen=True)
class Algorithm:
    """An evolutionary algorithm on packed genomes.

    Attributes:
        make: Size of the population, first population, operators and number of objectives to pymoo's algorithm.
    """

    make: Callable[[int, list[Genome], Operators, int], PymooAlgorithm]


ALGORITHMS: dict[str, Algorithm] = {"nsga2": Algorithm(nsga2), "moead": Algorithm(moead)}


def make_algorithm(
    name: str, population: int, first: list[Genome], operators: Operators, n_objectives: int
) -> PymooAlgorithm:
    """One of `ALGORITHMS`.

    Raises:
        ValueError: The algorithm is unknown.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"expected an algorithm among {', '.join(ALGORITHMS)}, found '{name}'")
    return ALGORITHMS[name].make(population, first, operators, n_objectives)
