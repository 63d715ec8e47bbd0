"""Operators on packed genomes: against the same thing on booleans, and what each may and may not change."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune import operators
from paretoprune.masks import pack_rows, unpack_row
from paretoprune.operators import AdaptiveVariation

N_BITS = st.integers(1, 200)
SEEDS = st.integers(0, 2**32 - 1)
# Layers of a genome may be empty: a corridor need not search in every layer.
SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any)


def random_genomes(n: int, n_bits: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return pack_rows(rng.random((n, n_bits)) < rng.random((n, 1)))


def booleans(words: np.ndarray, n_bits: int) -> np.ndarray:
    return np.array([unpack_row(row, n_bits) for row in words]).reshape(len(words), n_bits)


def offsets_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def padding_is_zero(words: np.ndarray, n_bits: int) -> bool:
    return words.dtype == np.uint64 and np.array_equal(pack_rows(booleans(words, n_bits)), words)


def variation_over(sizes: list[int], seed: int = 0, n_coordinates: int = 2, **settings: Any) -> AdaptiveVariation:
    rng = np.random.default_rng(seed)
    coordinates = [rng.random(sum(sizes)).astype(np.float32) for _ in range(n_coordinates)]
    return AdaptiveVariation(coordinates, offsets_of(sizes), **settings)


# Sampling


@given(
    density=st.floats(0.01, 0.99),
    softness=st.floats(0.001, 1.0),
    n_bits=st.integers(500, 800),
)
def test_keep_probabilities_rise_with_importance_and_average_to_the_density(
    density: float, softness: float, n_bits: int
) -> None:
    coordinate = (np.arange(n_bits) + 0.5) / n_bits
    probabilities = operators.keep_probabilities(coordinate, density, softness)
    assert np.all(np.diff(probabilities) >= 0)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    # The steepest step crosses one bit, so the mean cannot be placed finer than that.
    assert probabilities.mean() == pytest.approx(density, abs=1 / n_bits)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_the_ends_of_the_density_range_keep_nothing_and_everything(density: float) -> None:
    coordinate = (np.arange(100) + 0.5) / 100
    np.testing.assert_allclose(operators.keep_probabilities(coordinate, density, 0.05), density, atol=1e-6)


def test_softness_decides_how_strictly_importance_is_followed() -> None:
    coordinate = (np.arange(1000) + 0.5) / 1000
    strict = operators.keep_probabilities(coordinate, 0.3, 0.0005)
    np.testing.assert_allclose(strict[:690], 0, atol=1e-3)
    np.testing.assert_allclose(strict[710:], 1, atol=1e-3)
    assert np.ptp(operators.keep_probabilities(coordinate, 0.3, 100.0)) < 0.01


def test_samples_have_about_the_density_asked_for_and_prefer_what_matters() -> None:
    coordinate = np.random.default_rng(0).random(4001)
    densities = [0.1, 0.5, 0.9]
    words = operators.sample_bernoulli(coordinate, densities, 0.05, np.random.default_rng(1))
    assert padding_is_zero(words, 4001)
    bits = booleans(words, 4001)
    np.testing.assert_allclose(bits.mean(axis=1), densities, atol=0.03)
    assert all(coordinate[row].mean() > coordinate[~row].mean() + 0.3 for row in bits)


def test_blind_samples_have_about_the_density_asked_for() -> None:
    words = operators.sample_blind(4001, [0.0, 0.25, 1.0], np.random.default_rng(1))
    assert padding_is_zero(words, 4001)
    np.testing.assert_allclose(booleans(words, 4001).mean(axis=1), [0.0, 0.25, 1.0], atol=0.03)
    assert booleans(words, 4001)[2].all()


@given(N_BITS, SEEDS)
def test_samples_have_no_padding_bits(n_bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert padding_is_zero(operators.sample_bernoulli(rng.random(n_bits), [0.2, 0.9], 0.05, rng), n_bits)
    assert padding_is_zero(operators.sample_blind(n_bits, [0.2, 1.0], rng), n_bits)


def test_no_densities_are_no_samples() -> None:
    rng = np.random.default_rng(0)
    assert operators.sample_bernoulli(rng.random(70), [], 0.05, rng).shape == (0, 2)
    assert operators.sample_blind(70, [], rng).shape == (0, 2)


# Crossover and mutation


@given(SIZES)
def test_layer_words_mark_the_bits_of_each_layer(sizes: list[int]) -> None:
    words = operators.layer_words(offsets_of(sizes))
    expected = np.arange(len(sizes))[:, None] == np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(booleans(words, sum(sizes)), expected)
    assert padding_is_zero(words, sum(sizes))


@given(N_BITS, SEEDS)
def test_exchange_is_a_choice_between_booleans(n_bits: int, seed: int) -> None:
    words = random_genomes(3, n_bits, seed)
    first, second, where = booleans(words, n_bits)
    exchanged = operators.exchange(words[:1], words[1:2], words[2])
    np.testing.assert_array_equal(booleans(exchanged, n_bits)[0], np.where(where, second, first))


@given(SIZES, SEEDS)
def test_layer_crossover_takes_each_layer_whole_from_one_parent(sizes: list[int], seed: int) -> None:
    offsets, n_bits = offsets_of(sizes), sum(sizes)
    first, second = random_genomes(6, n_bits, seed), random_genomes(6, n_bits, seed + 1)
    children = operators.layer_crossover(first, second, operators.layer_words(offsets), np.random.default_rng(seed))
    assert padding_is_zero(children, n_bits)
    for child, one, other in zip(*(booleans(words, n_bits) for words in (children, first, second)), strict=True):
        for start, stop in pairwise(offsets):
            layer = child[start:stop].tolist()
            assert layer in (one[start:stop].tolist(), other[start:stop].tolist())


def test_layer_crossover_mixes_the_parents_half_and_half() -> None:
    zeros, ones = pack_rows(np.zeros((300, 200), dtype=bool)), pack_rows(np.ones((300, 200), dtype=bool))
    layers = operators.layer_words(offsets_of([50, 50, 50, 50]))
    children = booleans(operators.layer_crossover(zeros, ones, layers, np.random.default_rng(0)), 200)
    from_second = children[:, ::50]
    assert from_second.mean() == pytest.approx(0.5, abs=0.05)
    assert len(np.unique(from_second, axis=0)) == 16


@given(N_BITS, SEEDS)
def test_uniform_crossover_keeps_what_the_parents_share(n_bits: int, seed: int) -> None:
    first, second = random_genomes(4, n_bits, seed), random_genomes(4, n_bits, seed + 1)
    children = operators.uniform_crossover(first, second, np.random.default_rng(seed))
    assert padding_is_zero(children, n_bits)
    np.testing.assert_array_equal(children & first & second, first & second)
    np.testing.assert_array_equal(children | first | second, first | second)


def test_uniform_crossover_takes_about_half_the_bits_from_either_parent() -> None:
    zeros, ones = pack_rows(np.zeros((400, 150), dtype=bool)), pack_rows(np.ones((400, 150), dtype=bool))
    children = booleans(operators.uniform_crossover(zeros, ones, np.random.default_rng(0)), 150)
    np.testing.assert_allclose(children.mean(axis=0), 0.5, atol=0.12)
    np.testing.assert_allclose(children.mean(axis=1), 0.5, atol=0.2)


@given(n_bits=N_BITS, rate=st.floats(0, 1), seed=SEEDS)
def test_flipping_changes_at_least_one_bit_and_no_padding(n_bits: int, rate: float, seed: int) -> None:
    words = random_genomes(4, n_bits, seed)
    before = words.copy()
    flipped = operators.flip_bits(words, n_bits, rate, np.random.default_rng(seed))
    assert padding_is_zero(flipped, n_bits)
    np.testing.assert_array_equal(words, before)
    distance = np.bitwise_count(flipped ^ words).sum(axis=1)
    assert distance.min() >= 1
    if rate == 0:
        assert distance.max() == 1
    if rate == 1:
        assert distance.min() == n_bits


def test_bits_flip_at_the_rate_asked_for_wherever_they_lie() -> None:
    words = np.zeros((400, 4), dtype=np.uint64)
    flipped = booleans(operators.flip_bits(words, 200, 0.1, np.random.default_rng(0)), 200)
    assert flipped.mean() == pytest.approx(0.1, abs=0.005)
    np.testing.assert_allclose(flipped.mean(axis=0), 0.1, atol=0.07)


# Moves along importance

Move = Callable[[np.ndarray, np.ndarray, np.ndarray, int, float, np.random.Generator], int]


@pytest.mark.parametrize(("move", "value"), [(operators.drop, True), (operators.grow, False)])
@given(n_bits=N_BITS, n=st.integers(0, 220), softness=st.floats(0, 2), seed=SEEDS)
def test_drop_only_clears_and_grow_only_sets_and_only_where_allowed(
    move: Move, value: bool, n_bits: int, n: int, softness: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bits, coordinate = rng.random(n_bits) < 0.5, rng.random(n_bits)
    where = np.flatnonzero(rng.random(n_bits) < 0.7)
    before = bits.copy()
    n_moved = move(bits, coordinate, where, n, softness, rng)
    changed = np.flatnonzero(bits != before)
    assert n_moved == len(changed) == min(n, int((before[where] == value).sum()))
    assert set(changed) <= set(where)
    assert np.all(before[changed] == value)


def test_without_noise_drop_takes_what_matters_least_and_grow_what_matters_most() -> None:
    coordinate = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])
    everywhere, rng = np.arange(6), np.random.default_rng(0)
    bits = np.array([True, True, True, False, False, True])
    assert operators.drop(bits, coordinate, everywhere, 2, 0.0, rng) == 2
    assert bits.tolist() == [True, False, True, False, False, False]
    assert operators.grow(bits, coordinate, everywhere, 2, 0.0, rng) == 2
    assert bits.tolist() == [True, False, True, True, True, False]


@given(n_bits=N_BITS, n=st.integers(0, 220), softness=st.floats(0, 2), seed=SEEDS)
def test_swap_keeps_the_density_exactly(n_bits: int, n: int, softness: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits, coordinate = rng.random(n_bits) < rng.random(), rng.random(n_bits)
    drop_where, grow_where = (np.flatnonzero(rng.random(n_bits) < 0.6) for _ in range(2))
    before = bits.copy()
    n_swapped = operators.swap(bits, coordinate, drop_where, grow_where, n, softness, rng)
    assert bits.sum() == before.sum()
    assert n_swapped == min(n, int(before[drop_where].sum()), int((~before[grow_where]).sum()))
    cleared, grown = np.flatnonzero(before & ~bits), np.flatnonzero(~before & bits)
    assert len(cleared) == len(grown) == n_swapped
    assert set(cleared) <= set(drop_where)
    assert set(grown) <= set(grow_where)


# Adaptive variation


@given(SIZES, SEEDS)
def test_variation_changes_at_least_one_bit_of_every_genome_and_no_padding(sizes: list[int], seed: int) -> None:
    n_bits = sum(sizes)
    all_zero, all_one = np.zeros((6, n_bits), dtype=bool), np.ones((6, n_bits), dtype=bool)
    words = np.concatenate([pack_rows(all_zero), pack_rows(all_one), random_genomes(6, n_bits, seed)])
    before = words.copy()
    changed = variation_over(sizes, seed).vary(words, np.random.default_rng(seed))
    assert padding_is_zero(changed, n_bits)
    np.testing.assert_array_equal(words, before)
    assert np.all(np.any(changed != words, axis=1))


def test_variation_is_fixed_by_its_generator() -> None:
    words = random_genomes(8, 150, seed=0)
    first, again, other = (variation_over([80, 70]).vary(words, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@given(outcomes=st.lists(st.booleans(), max_size=60), floor=st.floats(0.01, 0.9), n_coordinates=st.integers(1, 3))
def test_probabilities_sum_to_one_and_never_fall_below_the_floor(
    outcomes: list[bool], floor: float, n_coordinates: int
) -> None:
    variation = variation_over([40, 30], n_coordinates=n_coordinates, floor=floor)
    rng = np.random.default_rng(0)
    for success in outcomes:
        variation.reward(variation.vary(random_genomes(1, 70, int(rng.integers(1000))), rng)[0], success)
    probabilities = variation.probabilities()
    assert len(probabilities) == 3 * n_coordinates
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities.min() >= floor / len(probabilities)


def test_before_anything_is_learnt_all_arms_are_alike() -> None:
    np.testing.assert_allclose(variation_over([40, 30]).probabilities(), 1 / 6)


@pytest.mark.parametrize("success", [True, False])
def test_the_arm_that_made_a_genome_gains_by_its_success_and_loses_by_its_failure(success: bool) -> None:
    variation = variation_over([40, 30])
    before = variation.probabilities()
    variation.reward(variation.vary(random_genomes(1, 70, 0), np.random.default_rng(0))[0], success)
    gain = variation.probabilities() - before
    arm = int(np.argmax(np.abs(gain)))
    assert gain[arm] > 0 if success else gain[arm] < 0
    assert np.all(np.delete(gain, arm) < 0) if success else np.all(np.delete(gain, arm) > 0)


def test_growing_becomes_the_most_probable_move_when_only_growing_succeeds() -> None:
    variation, rng = variation_over([200, 100], n_coordinates=1), np.random.default_rng(0)
    words = random_genomes(300, 300, seed=0)
    before, changed = np.bitwise_count(words).sum(axis=1), variation.vary(words, rng)
    for genome, grew in zip(changed, np.bitwise_count(changed).sum(axis=1) > before, strict=True):
        variation.reward(genome, bool(grew))
    probabilities = dict(zip(operators.MOVES, variation.probabilities(), strict=True))
    assert probabilities["grow"] > 0.6
    assert max(probabilities["drop"], probabilities["swap"]) < 0.2


def test_failures_shrink_the_steps() -> None:
    variation, rng = variation_over([1000, 1000], first_rate=0.1), np.random.default_rng(0)
    words = random_genomes(200, 2000, seed=0)

    def mean_distance() -> float:
        return float(np.bitwise_count(variation.vary(words, rng) ^ words).sum(axis=1).mean())

    before = mean_distance()
    for _ in range(3):
        for genome in variation.vary(words, rng):
            variation.reward(genome, False)
    assert mean_distance() < 0.4 * before


def test_success_of_larger_steps_enlarges_the_steps() -> None:
    variation, rng = variation_over([1000, 1000], first_rate=0.01), np.random.default_rng(0)
    words = random_genomes(200, 2000, seed=0)
    distances = []
    for _ in range(6):
        changed = variation.vary(words, rng)
        distances.append(np.bitwise_count(changed ^ words).sum(axis=1))
        for genome, distance in zip(changed, distances[-1], strict=True):
            if distance > np.median(distances[-1]):
                variation.reward(genome, True)
    assert distances[-1].mean() > 2 * distances[0].mean()


@pytest.mark.parametrize("success", [True, False])
def test_genomes_made_by_nobody_here_are_ignored(success: bool) -> None:
    variation, rng = variation_over([40, 30]), np.random.default_rng(0)
    before = variation.probabilities()
    for genome in random_genomes(5, 70, seed=3):
        variation.reward(genome, success)
    np.testing.assert_array_equal(variation.probabilities(), before)
    made = variation.vary(random_genomes(1, 70, seed=0), rng)[0]
    variation.reward(made, success)
    once = variation.probabilities()
    assert np.any(once != before)
    variation.reward(made, success)
    np.testing.assert_array_equal(variation.probabilities(), once)


def test_two_operators_learn_apart() -> None:
    first, second = variation_over([40, 30]), variation_over([40, 30])
    made = first.vary(random_genomes(1, 70, seed=0), np.random.default_rng(0))[0]
    second.reward(made, True)
    np.testing.assert_allclose(second.probabilities(), 1 / 6)
    first.reward(made, True)
    assert first.probabilities().max() > 1 / 6 + 0.01
