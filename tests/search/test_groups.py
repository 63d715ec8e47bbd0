"""Searched groups: which bits they hold, and their order."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from paretoprune.masks.packed import n_words_for, pack_rows, unpack_row
from paretoprune.search.groups import searched_groups
from spaces import SEEDS, SIZES, Space


@given(SIZES, SEEDS)
def test_searched_groups_hold_the_searched_bits_of_each_group_and_no_others(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed, share=0.1)
    parts = [(a, space.searched[a:b]) for a, b in pairwise(space.offsets) if space.searched[a:b].any()]
    assert len(space.groups) == len(parts)
    for group, (start, part) in zip(space.groups, parts, strict=True):
        found = np.zeros(n_words_for(space.n_bits) * 64, dtype=bool)
        found[group.word_slice.start * 64 :][: group.n_bits] = unpack_row(group.searched, group.n_bits)
        expected = np.zeros_like(found)
        expected[start : start + len(part)] = part
        np.testing.assert_array_equal(found, expected)
        assert (group.start, group.n_searched) == (start, part.sum())


@given(SIZES, SEEDS)
def test_rankings_order_the_searched_bits_of_each_group_by_importance(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    for group, ranking in zip(space.groups, space.rankings[0], strict=True):
        bits = ranking + group.word_slice.start * 64
        np.testing.assert_array_equal(np.sort(bits), np.flatnonzero(space.inside([space.groups.index(group)])))
        assert np.all(np.diff(space.scores[0][bits]) > 0)
        assert ranking.dtype == np.int32


def test_of_equal_scores_the_first_bit_counts_as_least_important() -> None:
    group = searched_groups(np.array([0, 100]), pack_rows(np.ones((1, 100), dtype=bool))[0])[0]
    np.testing.assert_array_equal(group.rank(np.zeros(100)), np.arange(100))
