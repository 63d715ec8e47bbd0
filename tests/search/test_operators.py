"""Operators on packed words: against the same thing on booleans, and what each may and may not change."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import n_words_for, pack_rows, unpack_row
from paretoprune.search import operators
from paretoprune.search.operators import AdaptiveVariation, Ranking, SearchedLayer, searched_layers

N_BITS = st.integers(1, 200)
SEEDS = st.integers(0, 2**32 - 1)
# A corridor need not search in every layer, and several layers may lie in one word.
SIZES = st.lists(st.integers(1, 150), min_size=1, max_size=6)


def random_words(n: int, n_bits: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return pack_rows(rng.random((n, n_bits)) < rng.random((n, 1)))


def boolean(words: np.ndarray, n_bits: int) -> np.ndarray:
    return unpack_row(words, n_bits)


def booleans(words: Sequence[np.ndarray] | np.ndarray, n_bits: int) -> np.ndarray:
    return np.array([unpack_row(row, n_bits) for row in words]).reshape(len(words), n_bits)


def padding_is_zero(words: np.ndarray, n_bits: int) -> bool:
    return words.dtype == np.uint64 and np.array_equal(pack_rows(boolean(words, n_bits)[None])[0], words)


def offsets_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


class Space:
    """Layers of given sizes of which a random part is searched, and random scores, all as booleans too."""

    def __init__(self, sizes: list[int], seed: int, share: float = 0.6, n_rankings: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.n_bits, self.offsets = sum(sizes), offsets_of(sizes)
        self.searched = rng.random(self.n_bits) < share
        self.searched[rng.integers(self.n_bits)] = True
        self.layers = searched_layers(self.offsets, pack_rows(self.searched[None])[0])
        self.scores = [rng.random(self.n_bits) for _ in range(n_rankings)]
        self.rankings = [self.rank(scores) for scores in self.scores]

    def rank(self, scores: np.ndarray) -> Ranking:
        return [layer.rank(scores) for layer in self.layers]

    def inside(self, chosen: Sequence[int]) -> np.ndarray:
        """The searched bits of some of the layers, bool (n_bits,)."""
        layer_of = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        usable = np.unique(layer_of[self.searched])
        return self.searched & np.isin(layer_of, usable[list(chosen)])

    def coordinates(self, scores: np.ndarray) -> np.ndarray:
        """The coordinate of each searched bit, from the definition; nan elsewhere."""
        coordinates = np.full(self.n_bits, np.nan)
        for start, stop in pairwise(self.offsets):
            at = start + np.flatnonzero(self.searched[start:stop])
            coordinates[at] = (scores[at].argsort().argsort() + 0.5) / max(len(at), 1)
        return coordinates

    def genomes(self, n: int, seed: int) -> list[Genome]:
        return [Genome(row) for row in random_words(n, self.n_bits, seed)]

    def variation(self, **settings: Any) -> AdaptiveVariation:
        return AdaptiveVariation(self.layers, self.rankings, **settings)


# Layers and rankings


@given(SIZES, SEEDS)
def test_searched_layers_hold_the_searched_bits_of_each_layer_and_no_others(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed, share=0.1)
    parts = [(a, space.searched[a:b]) for a, b in pairwise(space.offsets) if space.searched[a:b].any()]
    assert len(space.layers) == len(parts)
    for layer, (start, part) in zip(space.layers, parts, strict=True):
        found = np.zeros(n_words_for(space.n_bits) * 64, dtype=bool)
        found[layer.at.start * 64 :][: layer.n_bits] = unpack_row(layer.searched, layer.n_bits)
        expected = np.zeros_like(found)
        expected[start : start + len(part)] = part
        np.testing.assert_array_equal(found, expected)
        assert (layer.start, layer.n_searched) == (start, part.sum())


@given(SIZES, SEEDS)
def test_rankings_order_the_searched_bits_of_each_layer_by_importance(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    for layer, ranking in zip(space.layers, space.rankings[0], strict=True):
        bits = ranking + layer.at.start * 64
        np.testing.assert_array_equal(np.sort(bits), np.flatnonzero(space.inside([space.layers.index(layer)])))
        assert np.all(np.diff(space.scores[0][bits]) > 0)
        assert ranking.dtype == np.int32


def test_of_equal_scores_the_first_bit_counts_as_least_important() -> None:
    layer = searched_layers(np.array([0, 100]), pack_rows(np.ones((1, 100), dtype=bool))[0])[0]
    np.testing.assert_array_equal(layer.rank(np.zeros(100)), np.arange(100))


# Sampling


@given(density=st.floats(0.01, 0.99), softness=st.floats(0.001, 1.0), n_bits=st.integers(500, 800))
def test_keep_probabilities_rise_with_importance_and_average_to_the_density(
    density: float, softness: float, n_bits: int
) -> None:
    probabilities = operators.keep_probabilities(n_bits, density, softness)
    assert probabilities.shape == (n_bits,)
    assert np.all(np.diff(probabilities) >= 0)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    # The steepest step crosses one bit, so the mean cannot be placed finer than that.
    assert probabilities.mean() == pytest.approx(density, abs=1 / n_bits)


@pytest.mark.parametrize("density", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("softness", [1e-4, 0.05, 3.0])
def test_the_mean_probability_of_a_large_layer_is_the_density_itself(density: float, softness: float) -> None:
    probabilities = operators.keep_probabilities(1_000_000, density, softness).astype(float)
    assert probabilities.mean() == pytest.approx(density, abs=2e-6)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("softness", [1e-4, 0.05, 3.0])
def test_the_ends_of_the_density_range_keep_nothing_and_everything(density: float, softness: float) -> None:
    np.testing.assert_allclose(operators.keep_probabilities(100, density, softness), density, atol=1e-6)


def test_softness_decides_how_strictly_importance_is_followed() -> None:
    strict = operators.keep_probabilities(1000, 0.3, 0.0005)
    np.testing.assert_allclose(strict[:690], 0, atol=1e-3)
    np.testing.assert_allclose(strict[710:], 1, atol=1e-3)
    assert np.ptp(operators.keep_probabilities(1000, 0.3, 100.0)) < 0.01


def samples_of(space: Space, lower: np.ndarray, densities: list[float], seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    words = pack_rows(lower[None])[0]
    drawn = list(operators.sample_bernoulli(space.layers, space.rankings[0], words, densities, 0.05, rng))
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


def test_blind_samples_have_about_the_density_asked_for() -> None:
    words = list(operators.sample_blind(40_001, [0.0, 0.001, 0.25, 0.7, 1.0], np.random.default_rng(1)))
    assert all(padding_is_zero(row, 40_001) for row in words)
    bits = booleans(words, 40_001)
    np.testing.assert_allclose(bits.mean(axis=1), [0.0, 0.001, 0.25, 0.7, 1.0], atol=0.01)
    assert bits[1].mean() == pytest.approx(0.001, rel=0.5)
    assert not bits[0].any()
    assert bits[-1].all()


@given(N_BITS, st.floats(0, 1), SEEDS)
def test_random_words_have_no_padding_bits(n_bits: int, probability: float, seed: int) -> None:
    words = operators.random_words(n_bits, probability, np.random.default_rng(seed))
    assert padding_is_zero(words, n_bits)
    assert len(words) == n_words_for(n_bits)


def test_bits_of_random_words_are_drawn_apart() -> None:
    bits = booleans([operators.random_words(128, 0.3, np.random.default_rng(i)) for i in range(2000)], 128)
    np.testing.assert_allclose(bits.mean(axis=0), 0.3, atol=0.05)
    assert np.corrcoef(bits.T.astype(float))[~np.eye(128, dtype=bool)].max() < 0.12


# Crossover and mutation


@given(SIZES, SEEDS)
def test_one_point_crossover_joins_the_layers_of_two_parents_at_a_boundary(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    words = random_words(2, space.n_bits, seed)
    child = operators.one_point_crossover(words[0], words[1], space.layers, np.random.default_rng(seed))
    assert padding_is_zero(child, space.n_bits)
    bits, (first, second) = boolean(child, space.n_bits), booleans(words, space.n_bits)
    starts = [layer.start for layer in space.layers[1:]] or [space.n_bits]
    joined = [
        np.where(np.arange(space.n_bits) < start, *pair)
        for start in starts
        for pair in ((first, second), (second, first))
    ]
    assert any(np.array_equal(bits, expected) for expected in joined)


def test_crossover_leaves_its_parents_alone_even_with_a_single_layer() -> None:
    space = Space([100], seed=0)
    words = random_words(2, 100, 0)
    before = words.copy()
    child = operators.one_point_crossover(words[0], words[1], space.layers, np.random.default_rng(0))
    child[:] = 0
    operators.uniform_crossover(words[0], words[1], np.random.default_rng(0))[:] = 0
    np.testing.assert_array_equal(words, before)


def test_every_boundary_and_either_order_of_the_parents_occurs() -> None:
    space, rng = Space([50, 50, 50, 50], seed=0), np.random.default_rng(0)
    zeros, ones = pack_rows(np.array([[False], [True]]).repeat(200, axis=1))
    children = booleans([operators.one_point_crossover(zeros, ones, space.layers, rng) for _ in range(300)], 200)
    kinds, counts = np.unique(children[:, ::50], axis=0, return_counts=True)
    assert len(kinds) == 6
    assert counts.min() > 25


@given(N_BITS, SEEDS)
def test_uniform_crossover_keeps_what_the_parents_share(n_bits: int, seed: int) -> None:
    first, second = random_words(2, n_bits, seed)
    child = operators.uniform_crossover(first, second, np.random.default_rng(seed))
    assert padding_is_zero(child, n_bits)
    np.testing.assert_array_equal(child & first & second, first & second)
    np.testing.assert_array_equal(child | first | second, first | second)


def test_uniform_crossover_takes_about_half_the_bits_from_either_parent() -> None:
    rng = np.random.default_rng(0)
    zeros, ones = pack_rows(np.array([[False], [True]]).repeat(150, axis=1))
    children = booleans([operators.uniform_crossover(zeros, ones, rng) for _ in range(400)], 150)
    np.testing.assert_allclose(children.mean(axis=0), 0.5, atol=0.12)
    np.testing.assert_allclose(children.mean(axis=1), 0.5, atol=0.2)


@given(n_bits=N_BITS, rate=st.one_of(st.floats(0, 1), st.floats(0, 0.02)), seed=SEEDS)
def test_flipping_changes_at_least_one_bit_and_no_padding(n_bits: int, rate: float, seed: int) -> None:
    words = random_words(1, n_bits, seed)[0]
    before = words.copy()
    operators.flip_bits(words, n_bits, rate, np.random.default_rng(seed))
    assert padding_is_zero(words, n_bits)
    distance = int(np.bitwise_count(words ^ before).sum())
    assert distance >= 1
    if rate == 0:
        assert distance == 1
    if rate == 1:
        assert distance == n_bits


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_bits_flip_at_the_rate_asked_for_wherever_they_lie(rate: float) -> None:
    words, rng = np.zeros((2000, 4), dtype=np.uint64), np.random.default_rng(0)
    for row in words:
        operators.flip_bits(row, 200, rate, rng)
    flipped = booleans(words, 200)
    # "At least one" adds a little where almost none flip.
    assert flipped.mean() == pytest.approx(rate + np.exp(-200 * rate) / 200, rel=0.03)
    np.testing.assert_allclose(flipped.mean(axis=0), rate, atol=0.035)


# Moves along importance

Move = Callable[[np.ndarray, Sequence[SearchedLayer], Ranking, Sequence[int], int, float, np.random.Generator], int]


def some_of(space: Space, rng: np.random.Generator) -> list[int]:
    n = len(space.layers)
    return np.sort(rng.choice(n, size=rng.integers(1, n + 1), replace=False)).tolist()


@pytest.mark.parametrize(("move", "value"), [(operators.drop, True), (operators.grow, False)])
@given(sizes=SIZES, n=st.integers(1, 220), softness=st.floats(0, 2), seed=SEEDS)
def test_drop_only_clears_and_grow_only_sets_and_only_where_allowed(
    move: Move, value: bool, sizes: list[int], n: int, softness: float, seed: int
) -> None:
    space, rng = Space(sizes, seed), np.random.default_rng(seed)
    words, chosen = random_words(1, space.n_bits, seed)[0], some_of(space, rng)
    before = boolean(words, space.n_bits)
    n_moved = move(words, space.layers, space.rankings[0], chosen, n, softness, rng)
    changed = boolean(words, space.n_bits) != before
    movable = space.inside(chosen) & (before == value)
    assert n_moved == changed.sum() == min(n, (movable.sum() + 1) // 2)
    assert not np.any(changed & ~movable)
    assert padding_is_zero(words, space.n_bits)


@pytest.mark.parametrize(("move", "value"), [(operators.drop, True), (operators.grow, False)])
@given(sizes=SIZES, n=st.integers(1, 220), seed=SEEDS)
def test_without_noise_drop_takes_what_matters_least_and_grow_what_matters_most(
    move: Move, value: bool, sizes: list[int], n: int, seed: int
) -> None:
    space, rng = Space(sizes, seed), np.random.default_rng(seed)
    words, chosen = random_words(1, space.n_bits, seed)[0], some_of(space, rng)
    before = boolean(words, space.n_bits)
    move(words, space.layers, space.rankings[1], chosen, n, 0.0, rng)
    moved = boolean(words, space.n_bits) != before
    stayed = space.inside(chosen) & (before == value) & ~moved
    coordinates = space.coordinates(space.scores[1]) * (1 if value else -1)
    if moved.any() and stayed.any():
        assert coordinates[moved].max() <= coordinates[stayed].min() + 1e-6


def moved_like_the_definition(
    space: Space, bits: np.ndarray, n: int, softness: float, rng: np.random.Generator
) -> np.ndarray:
    """Which ones drop clears, by its definition: noise on every coordinate, and the lowest of all go."""
    noise = np.sqrt(12) * softness * rng.random(space.n_bits)
    noisy = np.where(bits & space.searched, space.coordinates(space.scores[0]) + noise, np.inf)
    moved = np.zeros(space.n_bits, dtype=bool)
    moved[np.argsort(noisy)[:n]] = True
    return moved


@pytest.mark.parametrize("softness", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("n", [3, 40, 150])
def test_each_bit_is_dropped_as_often_as_by_the_definition(softness: float, n: int) -> None:
    space, rng = Space([300, 90, 250], seed=1), np.random.default_rng(2)
    start = random_words(1, space.n_bits, 5)[0]
    bits, fast, slow = boolean(start, space.n_bits), np.zeros(space.n_bits), np.zeros(space.n_bits)
    assert (bits & space.searched).sum() > 2 * n
    for _ in range(1500):
        words = start.copy()
        operators.drop(words, space.layers, space.rankings[0], range(3), n, softness, rng)
        fast += boolean(words, space.n_bits) != bits
        slow += moved_like_the_definition(space, bits, n, softness, rng)
    # Four standard deviations of the difference of two shares.
    np.testing.assert_allclose(fast / 1500, slow / 1500, atol=4 * np.sqrt(0.5 / 1500))
    assert 0 < np.mean((fast > 0) & (fast < 1500)) < 1


@pytest.mark.parametrize("kept_from", [0.0, 0.7], ids=["ones anywhere", "ones among the most important only"])
@pytest.mark.parametrize("n", [1, 300, 6000])
@pytest.mark.parametrize("softness", [0.0, 0.03])
def test_large_layers_move_like_small_ones(kept_from: float, n: int, softness: float) -> None:
    # Large enough that only part of each order is looked at, and that every so many bits stand for all.
    space, rng = Space([40_000, 15_000], seed=0, share=0.9), np.random.default_rng(0)
    coordinates = space.coordinates(space.scores[0])
    before = (coordinates > kept_from) & (rng.random(space.n_bits) < 0.8)
    words = pack_rows(before[None])[0]
    assert operators.drop(words, space.layers, space.rankings[0], [0, 1], n, softness, rng) == n
    moved = before & ~boolean(words, space.n_bits)
    assert moved.sum() == n
    farthest, nearest = coordinates[moved].max(), coordinates[before & ~moved].min()
    width = np.sqrt(12) * softness
    assert farthest <= nearest + width + 1e-6
    if n == 6000:
        # There is noise, and it is as wide as its standard deviation says.
        assert farthest >= nearest + 0.8 * width - 1e-3


@given(sizes=SIZES, n=st.integers(1, 220), softness=st.floats(0, 2), seed=SEEDS)
def test_swap_keeps_the_density_exactly(sizes: list[int], n: int, softness: float, seed: int) -> None:
    space, rng = Space(sizes, seed), np.random.default_rng(seed)
    words, drop_in, grow_in = random_words(1, space.n_bits, seed)[0], some_of(space, rng), some_of(space, rng)
    before = boolean(words, space.n_bits)
    n_swapped = operators.swap(words, space.layers, space.rankings[0], drop_in, grow_in, n, softness, rng)
    after = boolean(words, space.n_bits)
    ones, zeros = space.inside(drop_in) & before, space.inside(grow_in) & ~before
    assert n_swapped == min(n, (ones.sum() + 1) // 2, (zeros.sum() + 1) // 2)
    cleared, grown = before & ~after, ~before & after
    assert cleared.sum() == grown.sum() == n_swapped
    assert not np.any(cleared & ~ones)
    assert not np.any(grown & ~zeros)
    assert padding_is_zero(words, space.n_bits)


# Adaptive variation


@given(SIZES, SEEDS)
def test_variation_changes_at_least_one_searched_bit_of_every_genome_and_no_other(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    extremes = pack_rows(np.array([[False], [True]]).repeat(space.n_bits, axis=1).repeat(6, axis=0))
    words = np.concatenate([extremes, random_words(6, space.n_bits, seed)])
    changed = space.variation().vary([Genome(row) for row in words], np.random.default_rng(seed))
    for genome, row in zip(changed, words, strict=True):
        assert padding_is_zero(genome.words, space.n_bits)
        difference = boolean(genome.words ^ row, space.n_bits)
        assert difference.any()
        assert not np.any(difference & ~space.searched)


def test_variation_changes_no_genome_in_place_but_drafts() -> None:
    space, rng = Space([80, 70], seed=0), np.random.default_rng(0)
    genome, draft = Genome(random_words(1, 150, 0)[0]), Genome(random_words(1, 150, 1)[0], draft=True)
    before = genome.words.copy()
    first, second = space.variation().vary([genome, draft], rng)
    np.testing.assert_array_equal(genome.words, before)
    assert not np.shares_memory(first.words, genome.words)
    assert second.words is draft.words
    assert not second.words.flags.writeable


def first_changes(space: Space, n: int, seed: int) -> np.ndarray:
    """Index of the first layer that a move changed, for `n` moves."""
    words, rng = random_words(1, space.n_bits, seed)[0], np.random.default_rng(seed)
    children = space.variation(first_rate=0.2).vary([Genome(words)] * n, rng)
    changed = booleans([child.words ^ words for child in children], space.n_bits)
    return np.searchsorted(space.offsets, changed.argmax(axis=1), side="right") - 1


def test_a_move_is_as_likely_to_begin_in_a_late_layer_as_its_size_says() -> None:
    # A move that drew any layers after the first would begin in the first of them far more often.
    space = Space([400, 400, 100, 400], seed=0, share=1.0)
    shares = np.bincount(first_changes(space, 4000, 0), minlength=4) / 4000
    # Of a swap only the first of its two sides is drawn this way, of a drop a later layer may offer all the bits.
    np.testing.assert_allclose(shares, np.array([2, 2, 1, 2]) / 7, atol=0.03)


def test_layers_of_a_move_are_drawn_from_the_earliest_on_and_in_order() -> None:
    space, rng = Space([50] * 8, seed=0), np.random.default_rng(0)
    variation = space.variation()
    drawn = [variation._some_layers(rng, earliest) for earliest in (0, 3, 7) for _ in range(1000)]
    assert all(layers == sorted(set(layers)) for layers in drawn)
    assert all(min(layers) >= 3 for layers in drawn[1000:])
    assert drawn[2000:] == [[7]] * 1000
    counts = np.bincount([len(layers) for layers in drawn[:1000] if layers[0] <= 2], minlength=4)
    np.testing.assert_allclose(counts[1:4] / counts.sum(), [1 / 2, 1 / 4, 1 / 8], atol=0.06)
    assert {layers[0] for layers in drawn[:1000]} == set(range(8))


def test_a_swap_may_move_weights_to_earlier_layers_as_well_as_to_later_ones() -> None:
    space, rng = Space([300, 300], seed=0, share=1.0), np.random.default_rng(0)
    variation, words = space.variation(), pack_rows(rng.random((1, 600)) < 0.5)[0]
    before = boolean(words, 600)[:300].sum()
    gains = []
    for _ in range(300):
        changed = words.copy()
        variation._apply(variation._arms[operators.MOVES.index("swap")], changed, 20, rng)
        assert np.bitwise_count(changed).sum() == np.bitwise_count(words).sum()
        gains.append(int(boolean(changed, 600)[:300].sum()) - int(before))
    assert min(gains) < -10
    assert max(gains) > 10


def test_variation_is_fixed_by_its_generator() -> None:
    space = Space([80, 70], seed=0)
    first, again, other = (
        [child.fingerprint for child in space.variation().vary(space.genomes(8, 0), np.random.default_rng(seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@given(outcomes=st.lists(st.booleans(), max_size=60), floor=st.floats(0.01, 0.9), n_rankings=st.integers(1, 3))
def test_probabilities_sum_to_one_and_never_fall_below_the_floor(
    outcomes: list[bool], floor: float, n_rankings: int
) -> None:
    space, rng = Space([40, 30], 0, n_rankings=n_rankings), np.random.default_rng(0)
    variation = space.variation(floor=floor)
    for success in outcomes:
        variation.reward(variation.vary(space.genomes(1, int(rng.integers(1000))), rng)[0], success)
    probabilities = variation.probabilities()
    assert len(probabilities) == 3 * n_rankings
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities.min() >= floor / len(probabilities)


def test_before_anything_is_learnt_all_arms_are_alike() -> None:
    np.testing.assert_allclose(Space([40, 30], 0).variation().probabilities(), 1 / 6)


@pytest.mark.parametrize("success", [True, False])
def test_the_arm_that_made_a_genome_gains_by_its_success_and_loses_by_its_failure(success: bool) -> None:
    space = Space([40, 30], 0)
    variation = space.variation()
    before = variation.probabilities()
    variation.reward(variation.vary(space.genomes(1, 0), np.random.default_rng(0))[0], success)
    gain = variation.probabilities() - before
    arm = int(np.argmax(np.abs(gain)))
    assert gain[arm] > 0 if success else gain[arm] < 0
    assert np.all(np.delete(gain, arm) < 0) if success else np.all(np.delete(gain, arm) > 0)


def n_kept(genome: Genome) -> int:
    return int(np.bitwise_count(genome.words).sum())


def test_growing_becomes_the_most_probable_move_when_only_growing_succeeds() -> None:
    space, rng = Space([200, 100], 0, n_rankings=1), np.random.default_rng(0)
    variation, genomes = space.variation(), space.genomes(300, 0)
    for genome, child in zip(genomes, variation.vary(genomes, rng), strict=True):
        variation.reward(child, n_kept(child) > n_kept(genome))
    probabilities = dict(zip(operators.MOVES, variation.probabilities(), strict=True))
    assert probabilities["grow"] > 0.6
    assert max(probabilities["drop"], probabilities["swap"]) < 0.2


def distances(variation: AdaptiveVariation, genomes: list[Genome], children: list[Genome]) -> np.ndarray:
    return np.array([np.bitwise_count(a.words ^ b.words).sum() for a, b in zip(genomes, children, strict=True)])


def test_failures_shrink_the_steps() -> None:
    space, rng = Space([1000, 1000], 0, share=1.0), np.random.default_rng(0)
    variation, genomes = space.variation(first_rate=0.1), space.genomes(200, 0)
    before = distances(variation, genomes, variation.vary(genomes, rng)).mean()
    for _ in range(3):
        for child in variation.vary(genomes, rng):
            variation.reward(child, False)
    assert distances(variation, genomes, variation.vary(genomes, rng)).mean() < 0.4 * before


def test_success_of_larger_steps_enlarges_the_steps() -> None:
    space, rng = Space([1000, 1000], 0, share=1.0), np.random.default_rng(0)
    variation, genomes = space.variation(first_rate=0.01), space.genomes(200, 0)
    found = []
    for _ in range(6):
        children = variation.vary(genomes, rng)
        found.append(distances(variation, genomes, children))
        for child, distance in zip(children, found[-1], strict=True):
            if distance > np.median(found[-1]):
                variation.reward(child, True)
    assert found[-1].mean() > 2 * found[0].mean()


@pytest.mark.parametrize("success", [True, False])
def test_genomes_made_by_nobody_here_are_ignored(success: bool) -> None:
    space, rng = Space([40, 30], 0), np.random.default_rng(0)
    variation = space.variation()
    before = variation.probabilities()
    for genome in space.genomes(5, 3):
        variation.reward(genome, success)
    np.testing.assert_array_equal(variation.probabilities(), before)
    made = variation.vary(space.genomes(1, 0), rng)[0]
    variation.reward(made, success)
    once = variation.probabilities()
    assert np.any(once != before)
    variation.reward(made, success)
    np.testing.assert_array_equal(variation.probabilities(), once)


def test_two_operators_learn_apart() -> None:
    space = Space([40, 30], 0)
    first, second = space.variation(), space.variation()
    made = first.vary(space.genomes(1, 0), np.random.default_rng(0))[0]
    second.reward(made, True)
    np.testing.assert_allclose(second.probabilities(), 1 / 6)
    first.reward(made, True)
    assert first.probabilities().max() > 1 / 6 + 0.01


def test_a_variation_that_does_not_adapt_stays_as_it_was() -> None:
    space, rng = Space([200, 100], 0), np.random.default_rng(0)
    fixed, learning = space.variation(adaptive=False), space.variation()
    for variation in (fixed, learning):
        genomes = space.genomes(40, 0)
        for genome, child in zip(genomes, variation.vary(genomes, rng), strict=True):
            variation.reward(child, n_kept(child) > n_kept(genome))
        assert not variation._pending
    np.testing.assert_allclose(fixed.probabilities(), 1 / 6)
    assert {arm.log_rate for arm in fixed._arms} == {np.log(0.02)}
    assert learning.probabilities().max() > 1 / 6 + 0.01
    assert len({arm.log_rate for arm in learning._arms}) > 1


# Rankings that depend on the mask


def test_moves_follow_a_moving_ranking_of_the_mask_itself() -> None:
    space = Space([120, 90, 60], 0, share=1.0)

    def moving(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        # Whatever the first bit of the mask says, this way round or that.
        ranking = space.rankings[int(words[0]) & 1]
        return {k: ranking[k] for k in chosen}

    settings: dict[str, Any] = {"softness": 0.0}
    for genome in space.genomes(20, 3):
        static = AdaptiveVariation(space.layers, [space.rankings[int(genome.words[0]) & 1]], **settings)
        expected = static.vary([genome], np.random.default_rng(5))[0]
        found = AdaptiveVariation(space.layers, [moving], **settings).vary([genome], np.random.default_rng(5))[0]
        assert found.fingerprint == expected.fingerprint
    other = AdaptiveVariation(space.layers, [space.rankings[0]], **settings)
    differing = [g for g in space.genomes(20, 3) if int(g.words[0]) & 1]
    assert any(
        other.vary([g], np.random.default_rng(5))[0].fingerprint
        != AdaptiveVariation(space.layers, [moving], **settings).vary([g], np.random.default_rng(5))[0].fingerprint
        for g in differing
    )


def test_a_moving_ranking_learns_beside_others_and_is_only_asked_when_it_is_drawn() -> None:
    space, asked = Space([120, 90, 60], 0), []

    def moving(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        asked.append(list(chosen))
        return {k: space.rankings[1][k] for k in chosen}

    variation = AdaptiveVariation(space.layers, [space.rankings[0], moving])
    np.testing.assert_allclose(variation.probabilities(), 1 / 6)
    variation.vary(space.genomes(200, 0), np.random.default_rng(0))
    assert len(asked) == pytest.approx(100, abs=30)
    assert all(chosen == sorted(set(chosen)) for chosen in asked)


# Along a ladder

RUNGS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8, unique=True).map(lambda rungs: np.array(sorted(rungs)))


@given(rungs=RUNGS, densities=st.lists(st.floats(0.0005, 1.0), min_size=1, max_size=10))
def test_the_nearest_rung_is_nearest_in_the_logarithm(rungs: np.ndarray, densities: list[float]) -> None:
    found = operators.nearest_rungs(np.array(densities), rungs)
    for density, level in zip(densities, found, strict=True):
        distances = np.abs(np.log(density) - np.log(rungs))
        assert distances[level] <= distances.min() + 1e-9


@given(RUNGS)
def test_rungs_are_nearest_to_themselves_and_the_ends_to_the_ends(rungs: np.ndarray) -> None:
    np.testing.assert_array_equal(operators.nearest_rungs(rungs, rungs), np.arange(len(rungs)))
    table = np.array([[0.0, 1.0], [rungs[0], rungs[-1]]])
    np.testing.assert_array_equal(operators.nearest_rungs(table, rungs), [[0, len(rungs) - 1]] * 2)


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8), n_rungs=st.integers(1, 12), seed=SEEDS)
def test_level_switches_keep_the_total_to_within_one_step(sizes: list[int], n_rungs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = np.rint(np.geomspace(0.005, 1.0, n_rungs) * np.array(sizes)[:, None]).astype(int)
    layers = np.arange(len(sizes))
    levels = rng.integers(0, n_rungs, len(sizes))
    before = levels.copy()
    way = 1 if copy.deepcopy(rng).random() < 0.5 else -1
    found = operators.switch_levels(levels, kept, rng)
    np.testing.assert_array_equal(levels, before)
    moved = found - levels
    assert np.abs(moved).max() <= 1
    assert found.min() >= 0
    assert found.max() < n_rungs
    # One layer goes one way, and all others that move go the other.
    first = np.flatnonzero(moved == way)
    assert len(first) <= 1
    change = kept[layers, found] - kept[layers, levels]
    if len(first):
        assert abs(int(change.sum())) <= abs(int(change[first[0]]))
    else:
        assert not np.any(moved)


def test_level_switches_go_either_way_from_any_layer_and_are_paid_back_by_others() -> None:
    rng = np.random.default_rng(0)
    kept = np.array([[10, 20, 40]] * 6)
    levels = np.ones(6, dtype=int)
    moves = [operators.switch_levels(levels, kept, rng) - levels for _ in range(300)]
    # Up by 20 is paid back by two layers down by 10; down by 10 by one layer up by 20, twice what is owed and no more.
    kinds = {((m == 1).sum().item(), (m == -1).sum().item()) for m in moves}
    assert kinds == {(1, 2), (1, 1)}
    assert {int(np.flatnonzero(m == 1)[0]) for m in moves} == set(range(6))
    assert len({int(np.flatnonzero(m == -1)[0]) for m in moves}) >= 5


def test_a_layer_much_larger_than_what_is_owed_does_not_pay() -> None:
    kept = np.array([[1, 2], [1000, 5000]])
    found = {
        tuple(operators.switch_levels(np.array([0, 1]), kept, np.random.default_rng(i)).tolist()) for i in range(50)
    }
    # The small layer cannot be paid for by the large one; the large one down takes the small one up.
    assert found == {(1, 1), (1, 0)}
