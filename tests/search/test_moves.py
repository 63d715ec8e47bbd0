"""Crossover and moves on packed words: against booleans, and what each of them may change."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.packed import pack_rows
from paretoprune.search.moves import Moves, flip_bits, one_point_crossover, uniform_crossover
from spaces import N_BITS, SEEDS, SIZES, Space, boolean, booleans, padding_is_zero, some_of, some_words


@given(SIZES, SEEDS)
def test_one_point_crossover_joins_the_groups_of_two_parents_at_a_boundary(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    words = some_words(2, space.n_bits, seed)
    child = one_point_crossover(words[0], words[1], space.groups, np.random.default_rng(seed))
    assert padding_is_zero(child, space.n_bits)
    bits, (first, second) = boolean(child, space.n_bits), booleans(words, space.n_bits)
    starts = [group.start for group in space.groups[1:]] or [space.n_bits]
    joined = [
        np.where(np.arange(space.n_bits) < start, *pair)
        for start in starts
        for pair in ((first, second), (second, first))
    ]
    assert any(np.array_equal(bits, expected) for expected in joined)


def test_crossover_leaves_its_parents_alone_even_with_a_single_group() -> None:
    space = Space([100], seed=0)
    words = some_words(2, 100, 0)
    before = words.copy()
    child = one_point_crossover(words[0], words[1], space.groups, np.random.default_rng(0))
    child[:] = 0
    uniform_crossover(words[0], words[1], np.random.default_rng(0))[:] = 0
    np.testing.assert_array_equal(words, before)


def test_every_boundary_and_either_order_of_the_parents_occurs() -> None:
    space, rng = Space([50, 50, 50, 50], seed=0), np.random.default_rng(0)
    zeros, ones = pack_rows(np.array([[False], [True]]).repeat(200, axis=1))
    children = booleans([one_point_crossover(zeros, ones, space.groups, rng) for _ in range(300)], 200)
    kinds, counts = np.unique(children[:, ::50], axis=0, return_counts=True)
    assert len(kinds) == 6
    assert counts.min() > 25


@given(N_BITS, SEEDS)
def test_uniform_crossover_keeps_what_the_parents_share(n_bits: int, seed: int) -> None:
    first, second = some_words(2, n_bits, seed)
    child = uniform_crossover(first, second, np.random.default_rng(seed))
    assert padding_is_zero(child, n_bits)
    np.testing.assert_array_equal(child & first & second, first & second)
    np.testing.assert_array_equal(child | first | second, first | second)


def test_uniform_crossover_takes_about_half_the_bits_from_either_parent() -> None:
    rng = np.random.default_rng(0)
    zeros, ones = pack_rows(np.array([[False], [True]]).repeat(150, axis=1))
    children = booleans([uniform_crossover(zeros, ones, rng) for _ in range(400)], 150)
    np.testing.assert_allclose(children.mean(axis=0), 0.5, atol=0.12)
    np.testing.assert_allclose(children.mean(axis=1), 0.5, atol=0.2)


@given(n_bits=N_BITS, rate=st.one_of(st.floats(0, 1), st.floats(0, 0.02)), seed=SEEDS)
def test_flipping_changes_at_least_one_bit_and_no_padding(n_bits: int, rate: float, seed: int) -> None:
    words = some_words(1, n_bits, seed)[0]
    before = words.copy()
    flip_bits(words, n_bits, rate, np.random.default_rng(seed))
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
        flip_bits(row, 200, rate, rng)
    flipped = booleans(words, 200)
    # "At least one" adds a little where almost none flip.
    assert flipped.mean() == pytest.approx(rate + np.exp(-200 * rate) / 200, rel=0.03)
    np.testing.assert_allclose(flipped.mean(axis=0), rate, atol=0.035)


Move = Callable[[Moves, np.ndarray, Sequence[int], int, np.random.Generator], int]


@pytest.mark.parametrize(("move", "value"), [(Moves.drop, True), (Moves.grow, False)])
@given(sizes=SIZES, n=st.integers(1, 220), softness=st.floats(0, 2), seed=SEEDS)
def test_drop_only_clears_and_grow_only_sets_and_only_in_the_chosen_groups(
    move: Move, value: bool, sizes: list[int], n: int, softness: float, seed: int
) -> None:
    space, rng = Space(sizes, seed), np.random.default_rng(seed)
    words, chosen = some_words(1, space.n_bits, seed)[0], some_of(space, rng)
    before = boolean(words, space.n_bits)
    n_moved = move(Moves(space.groups, space.rankings[0], softness), words, chosen, n, rng)
    changed = boolean(words, space.n_bits) != before
    movable = space.inside(chosen) & (before == value)
    assert n_moved == changed.sum() == min(n, (movable.sum() + 1) // 2)
    assert not np.any(changed & ~movable)
    assert padding_is_zero(words, space.n_bits)


@pytest.mark.parametrize(("move", "value"), [(Moves.drop, True), (Moves.grow, False)])
@given(sizes=SIZES, n=st.integers(1, 220), seed=SEEDS)
def test_without_noise_drop_takes_what_matters_least_and_grow_what_matters_most(
    move: Move, value: bool, sizes: list[int], n: int, seed: int
) -> None:
    space, rng = Space(sizes, seed), np.random.default_rng(seed)
    words, chosen = some_words(1, space.n_bits, seed)[0], some_of(space, rng)
    before = boolean(words, space.n_bits)
    move(Moves(space.groups, space.rankings[1], 0.0), words, chosen, n, rng)
    moved = boolean(words, space.n_bits) != before
    stayed = space.inside(chosen) & (before == value) & ~moved
    coordinates = space.coordinates(space.scores[1]) * (1 if value else -1)
    if moved.any() and stayed.any():
        assert coordinates[moved].max() <= coordinates[stayed].min() + 1e-6


def moved_like_the_definition(
    space: Space, bits: np.ndarray, n: int, softness: float, rng: np.random.Generator
) -> np.ndarray:
    """The ones that drop clears by its definition: noise on every coordinate, then the lowest of all."""
    noise = np.sqrt(12) * softness * rng.random(space.n_bits)
    noisy = np.where(bits & space.searched, space.coordinates(space.scores[0]) + noise, np.inf)
    moved = np.zeros(space.n_bits, dtype=bool)
    moved[np.argsort(noisy)[:n]] = True
    return moved


@pytest.mark.parametrize("softness", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("n", [3, 40, 150])
def test_each_bit_is_dropped_as_often_as_by_the_definition(softness: float, n: int) -> None:
    space, rng = Space([300, 90, 250], seed=1), np.random.default_rng(2)
    start = some_words(1, space.n_bits, 5)[0]
    bits, fast, slow = boolean(start, space.n_bits), np.zeros(space.n_bits), np.zeros(space.n_bits)
    assert (bits & space.searched).sum() > 2 * n
    for _ in range(1500):
        words = start.copy()
        Moves(space.groups, space.rankings[0], softness).drop(words, range(3), n, rng)
        fast += boolean(words, space.n_bits) != bits
        slow += moved_like_the_definition(space, bits, n, softness, rng)
    # Four standard deviations of the difference of two shares.
    np.testing.assert_allclose(fast / 1500, slow / 1500, atol=4 * np.sqrt(0.5 / 1500))
    assert 0 < np.mean((fast > 0) & (fast < 1500)) < 1


@pytest.mark.parametrize("kept_from", [0.0, 0.7], ids=["ones anywhere", "ones among the most important only"])
@pytest.mark.parametrize("n", [1, 300, 6000])
@pytest.mark.parametrize("softness", [0.0, 0.03])
def test_large_groups_move_like_small_ones(kept_from: float, n: int, softness: float) -> None:
    # Large enough that only part of each order is read, and that markers stand for several bits.
    space, rng = Space([40_000, 15_000], seed=0, share=0.9), np.random.default_rng(0)
    coordinates = space.coordinates(space.scores[0])
    before = (coordinates > kept_from) & (rng.random(space.n_bits) < 0.8)
    words = pack_rows(before[None])[0]
    assert Moves(space.groups, space.rankings[0], softness).drop(words, [0, 1], n, rng) == n
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
    words, drop_in, grow_in = some_words(1, space.n_bits, seed)[0], some_of(space, rng), some_of(space, rng)
    before = boolean(words, space.n_bits)
    n_swapped = Moves(space.groups, space.rankings[0], softness).swap(words, drop_in, grow_in, n, rng)
    after = boolean(words, space.n_bits)
    ones, zeros = space.inside(drop_in) & before, space.inside(grow_in) & ~before
    assert n_swapped == min(n, (ones.sum() + 1) // 2, (zeros.sum() + 1) // 2)
    cleared, grown = before & ~after, ~before & after
    assert cleared.sum() == grown.sum() == n_swapped
    assert not np.any(cleared & ~ones)
    assert not np.any(grown & ~zeros)
    assert padding_is_zero(words, space.n_bits)
