"""Samples for a first population."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.packed import n_words_for, pack_rows
from paretoprune.search.sampling import keep_probabilities, random_words, sample_bernoulli, sample_unguided
from spaces import N_BITS, SEEDS, SIZES, Space, booleans, padding_is_zero


@given(density=st.floats(0.01, 0.99), softness=st.floats(0.001, 1.0), n_bits=st.integers(500, 800))
def test_keep_probabilities_rise_with_importance_and_average_to_the_density(
    density: float, softness: float, n_bits: int
) -> None:
    probabilities = keep_probabilities(n_bits, density, softness)
    assert probabilities.shape == (n_bits,)
    assert np.all(np.diff(probabilities) >= 0)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    # The steepest step lies within one bit, so the mean is not finer than that.
    assert probabilities.mean() == pytest.approx(density, abs=1 / n_bits)


@pytest.mark.parametrize("density", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("softness", [1e-4, 0.05, 3.0])
def test_the_mean_probability_of_a_large_group_is_the_density_itself(density: float, softness: float) -> None:
    probabilities = keep_probabilities(1_000_000, density, softness).astype(float)
    assert probabilities.mean() == pytest.approx(density, abs=2e-6)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("softness", [1e-4, 0.05, 3.0])
def test_the_ends_of_the_density_range_keep_nothing_and_everything(density: float, softness: float) -> None:
    np.testing.assert_allclose(keep_probabilities(100, density, softness), density, atol=1e-6)


def test_softness_decides_how_strictly_importance_is_followed() -> None:
    strict = keep_probabilities(1000, 0.3, 0.0005)
    np.testing.assert_allclose(strict[:690], 0, atol=1e-3)
    np.testing.assert_allclose(strict[710:], 1, atol=1e-3)
    assert np.ptp(keep_probabilities(1000, 0.3, 100.0)) < 0.01


def samples_of(space: Space, lower: np.ndarray, densities: list[float], seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    words = pack_rows(lower[None])[0]
    drawn = list(sample_bernoulli(space.groups, space.rankings[0], words, densities, 0.05, rng))
    assert all(padding_is_zero(row, space.n_bits) for row in drawn)
    return booleans(drawn, space.n_bits)


def test_samples_have_about_the_density_asked_for_and_prefer_what_matters() -> None:
    space, densities = Space([4001, 3000], seed=0), [0.1, 0.5, 0.9]
    bits = samples_of(space, np.zeros(space.n_bits, dtype=bool), densities)[:, space.searched]
    np.testing.assert_allclose(bits.mean(axis=1), densities, atol=0.03)
    coordinate = space.coordinates(space.scores[0])[space.searched]
    assert all(coordinate[row].mean() > coordinate[~row].mean() + 0.3 for row in bits)


@given(SIZES, SEEDS)
def test_samples_stay_in_the_corridor(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    lower = ~space.searched & (np.random.default_rng(seed).random(space.n_bits) < 0.5)
    for row in samples_of(space, lower, [0.2, 0.9, 1.0], seed):
        np.testing.assert_array_equal(row[~space.searched], lower[~space.searched])


def test_unguided_samples_have_about_the_density_asked_for() -> None:
    words = list(sample_unguided(40_001, [0.0, 0.001, 0.25, 0.7, 1.0], np.random.default_rng(1)))
    assert all(padding_is_zero(row, 40_001) for row in words)
    bits = booleans(words, 40_001)
    np.testing.assert_allclose(bits.mean(axis=1), [0.0, 0.001, 0.25, 0.7, 1.0], atol=0.01)
    assert bits[1].mean() == pytest.approx(0.001, rel=0.5)
    assert not bits[0].any()
    assert bits[-1].all()


@given(N_BITS, st.floats(0, 1), SEEDS)
def test_random_words_have_no_padding_bits(n_bits: int, probability: float, seed: int) -> None:
    words = random_words(n_bits, probability, np.random.default_rng(seed))
    assert padding_is_zero(words, n_bits)
    assert len(words) == n_words_for(n_bits)


def test_bits_of_random_words_are_drawn_apart() -> None:
    bits = booleans([random_words(128, 0.3, np.random.default_rng(i)) for i in range(2000)], 128)
    np.testing.assert_allclose(bits.mean(axis=0), 0.3, atol=0.05)
    assert np.corrcoef(bits.T.astype(float))[~np.eye(128, dtype=bool)].max() < 0.12
