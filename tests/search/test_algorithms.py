"""Algorithms: their first population, and reference directions."""

import numpy as np
import pytest
from paretoprune.masks.genomes import Genome
from paretoprune.search.algorithms import Operators, make_algorithm, reference_directions

KEEP = Operators(lambda a, b, rng: a.copy(), lambda genomes, rng: genomes, 0.5)


@pytest.mark.parametrize(("n_objectives", "population", "expected"), [(2, 12, 12), (3, 12, 10), (3, 30, 28)])
def test_directions_are_as_many_as_the_population_allows(n_objectives: int, population: int, expected: int) -> None:
    found = reference_directions(n_objectives, population)
    assert found.shape == (expected, n_objectives)
    np.testing.assert_allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize(("n_objectives", "expected"), [(2, 12), (3, 10)])
def test_moead_starts_from_the_whole_range_of_a_population(n_objectives: int, expected: int) -> None:
    first = [Genome(np.array([2**i - 1], dtype=np.uint64)) for i in range(12)]
    kept = [int(np.bitwise_count(genome.words[0])) for genome in first]
    algorithm = make_algorithm("moead", 12, first, KEEP, n_objectives)
    x = algorithm.initialization.sampling().get("X")
    found = [int(np.bitwise_count(genome.words[0])) for genome in x[:, 0]]
    assert len(found) == expected
    # Neither the densest nor the sparsest are cut off.
    assert (found[0], found[-1]) == (kept[0], kept[-1])
    assert found == sorted(set(found))
