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
    """How children are made: crossover of two parents, then variation.

    Attributes:
        cross: Crossover.
        vary: Variation of what crossover made.
        crossover_probability: Probability that a child has two parents.
    """

    cross: Cross
    vary: Vary
    crossover_probability: float

    def pymoo(self) -> dict[str, Any]:
        """The operators as arguments of pymoo's algorithms."""
        return {
            "crossover": PackedCrossover(self.cross, self.crossover_probability),
            "mutation": PackedMutation(self.vary),
        }


def sampling_of(first_population: list[Genome]) -> Callable[..., Population]:
    """A sampling for pymoo that returns the given first population and empties the list."""

    # If pymoo were given an array, it would keep it to the end, and with it all genomes that have died out.
    def sample(*args: Any, **kwargs: Any) -> Population:
        x = individuals(first_population)
        first_population.clear()
        return Population.new("X", x)

    return sample


def reference_directions(n_objectives: int, population: int) -> np.ndarray:
    """Evenly spread weight vectors, one for each member of a population.

    With more than two objectives only some numbers of evenly spread vectors exist. Then there are as many as possible,
    but no more than members.

    Args:
        n_objectives: At least 2.
        population: Size of the population, at least `n_objectives`.

    Returns:
        float (n_directions, n_objectives), each row adding up to 1.

    Source:
        Das and Dennis, "Normal-boundary intersection", 1998, in pymoo.
    """
    n_partitions = population - 1
    # p partitions give (p + m - 1) over (m - 1) directions of m objectives; with two that is p + 1, the population.
    while n_partitions > 1 and comb(n_partitions + n_objectives - 1, n_objectives - 1) > population:
        n_partitions -= 1
    directions: np.ndarray = get_reference_directions("uniform", n_objectives, n_partitions=n_partitions)
    return directions


def nsga2(
    population: int, first_population: list[Genome], operators: Operators, n_objectives: int, **options: Any
) -> PymooAlgorithm:
    """NSGA-II; with more than two objectives NSGA-III, which spreads its members along reference directions.

    Args:
        population: Size of the population.
        first_population: The first population; the list is emptied when the algorithm takes it.
        operators: How children are made.
        n_objectives: Number of objectives, the loss included.
        options: Further arguments of pymoo's NSGA2; with any of them it is NSGA-II in all cases.

    Source:
        Deb et al., 2002, and Deb and Jain, 2014; both in pymoo.
    """
    common: dict[str, Any] = {
        "pop_size": population,
        "sampling": sampling_of(first_population),
        "eliminate_duplicates": PackedDuplicates(),
        **operators.pymoo(),
    }
    if n_objectives > 2 and not options:
        return NSGA3(ref_dirs=reference_directions(n_objectives, population), **common)
    return NSGA2(**common, **options)


def moead(population: int, first_population: list[Genome], operators: Operators, n_objectives: int) -> PymooAlgorithm:
    """MOEA/D with Tchebycheff decomposition; arguments as for `nsga2`.

    Source:
        Zhang and Li, 2007, in pymoo.
    """
    directions = reference_directions(n_objectives, population)
    # One member for each direction. Where there are more members, they are left out evenly over the whole range.
    n_members = min(len(directions), len(first_population))
    first_population[:] = [
        first_population[i] for i in np.linspace(0, len(first_population) - 1, n_members).round().astype(int)
    ]
    # With more than two objectives pymoo's default is another decomposition, for which `search.survival` has no bounds.
    return ParallelMOEAD(
        ref_dirs=directions,
        n_neighbors=max(2, min(20, population // 3)),
        decomposition=Tchebicheff(),
        sampling=sampling_of(first_population),
        **operators.pymoo(),
    )


@dataclass(frozen=True)
class Algorithm:
    """An evolutionary algorithm on packed genomes.

    Attributes:
        make: From the size of the population, the first population, operators and the number of objectives to an
            algorithm of pymoo.
    """

    make: Callable[[int, list[Genome], Operators, int], PymooAlgorithm]


ALGORITHMS: dict[str, Algorithm] = {"nsga2": Algorithm(nsga2), "moead": Algorithm(moead)}


def make_algorithm(
    name: str, population: int, first_population: list[Genome], operators: Operators, n_objectives: int
) -> PymooAlgorithm:
    """Make one of `ALGORITHMS`; arguments as for `nsga2`.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"expected an algorithm among {', '.join(ALGORITHMS)}, found '{name}'")
    return ALGORITHMS[name].make(population, first_population, operators, n_objectives)
