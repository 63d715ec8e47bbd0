"""Random spaces of searched bits, as words and as booleans, that several tests share."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import pack_rows, unpack_row
from paretoprune.search.adaptive import AdaptiveVariation
from paretoprune.search.groups import Ranking, searched_groups

N_BITS = st.integers(1, 200)
SEEDS = st.integers(0, 2**32 - 1)
# Some groups may have no searched bits, and several groups may share a word.
SIZES = st.lists(st.integers(1, 150), min_size=1, max_size=6)


def some_words(n: int, n_bits: int, seed: int) -> np.ndarray:
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
    """Groups of given sizes of which a random part is searched, and random scores, all as booleans too."""

    def __init__(self, sizes: list[int], seed: int, share: float = 0.6, n_rankings: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.n_bits, self.offsets = sum(sizes), offsets_of(sizes)
        self.searched = rng.random(self.n_bits) < share
        self.searched[rng.integers(self.n_bits)] = True
        self.groups = searched_groups(self.offsets, pack_rows(self.searched[None])[0])
        self.scores = [rng.random(self.n_bits) for _ in range(n_rankings)]
        self.rankings = [self.rank(scores) for scores in self.scores]

    def rank(self, scores: np.ndarray) -> Ranking:
        return [group.rank(scores) for group in self.groups]

    def inside(self, chosen: Sequence[int]) -> np.ndarray:
        """The searched bits of some of the groups, bool (n_bits,)."""
        group_of = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        usable = np.unique(group_of[self.searched])
        return self.searched & np.isin(group_of, usable[list(chosen)])

    def coordinates(self, scores: np.ndarray) -> np.ndarray:
        """The coordinate of each searched bit, from the definition; nan elsewhere."""
        coordinates = np.full(self.n_bits, np.nan)
        for start, stop in pairwise(self.offsets):
            at = start + np.flatnonzero(self.searched[start:stop])
            coordinates[at] = (scores[at].argsort().argsort() + 0.5) / max(len(at), 1)
        return coordinates

    def genomes(self, n: int, seed: int) -> list[Genome]:
        return [Genome(row) for row in some_words(n, self.n_bits, seed)]

    def variation(self, **settings: Any) -> AdaptiveVariation:
        return AdaptiveVariation(self.groups, self.rankings, **settings)


def some_of(space: Space, rng: np.random.Generator) -> list[int]:
    n = len(space.groups)
    return np.sort(rng.choice(n, size=rng.integers(1, n + 1), replace=False)).tolist()
