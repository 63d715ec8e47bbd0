"""The searched bits of each group, their order, and the words that hold them.

Words are one row of `masks.packed.pack_rows`, uint64 (n_words,), in mask order. What guides samples and moves is a
*ranking*: the searched bits of each group from the least to the most important. Number i of the n searched bits of a
group has the *coordinate* (i + 0.5) / n in it, so that groups of different sizes can be compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from paretoprune.masks.packed import WORD_BITS, n_words_for, pack_rows, unpack_row


@dataclass(frozen=True)
class SearchedGroup:
    """The searched bits of one group, and which words hold them.

    Attributes:
        start: First bit of the group in a mask.
        at: The words that hold its bits; the outer two may be shared with the groups beside it.
        searched: uint64 (n_words_of_the_group,), its searched bits; those of other groups are 0.
        n_searched: How many there are.
    """

    start: int
    at: slice
    searched: np.ndarray
    n_searched: int

    @property
    def n_bits(self) -> int:
        """Bits of the words that hold it, those of other groups included."""
        return len(self.searched) * WORD_BITS

    def select(self, words: np.ndarray, *, value: bool) -> np.ndarray:
        """Which of its searched bits have the value, bool (n_bits,)."""
        inside = words[self.at]
        return unpack_row(self.searched & (inside if value else ~inside), self.n_bits)

    def rank(self, scores: np.ndarray) -> np.ndarray:
        """Its searched bits from the least to the most important; of equal ones the first comes first.

        Args:
            scores: float (n_weights,), higher = keep.

        Returns:
            int32 (n_searched,), counted from the first bit of the first word.
        """
        bits = np.flatnonzero(unpack_row(self.searched, self.n_bits))
        order = np.argsort(scores[bits + self.at.start * WORD_BITS], kind="stable")
        return bits[order].astype(np.int32)


# One array per searched group, see `SearchedGroup.rank`.
Ranking = Sequence[np.ndarray]
# From a mask's words, uint64 (n_words,), and indices of searched groups to the order of the bits of each, as it is for
# that mask.
MovingRanking = Callable[[np.ndarray, Sequence[int]], Mapping[int, np.ndarray]]
# What a move looks up the order of a group's bits in.
Orders = Ranking | Mapping[int, np.ndarray]


def searched_groups(offsets: np.ndarray, searched: np.ndarray) -> list[SearchedGroup]:
    """The groups that have bits to search.

    Args:
        offsets: int (n_groups + 1,), where each group starts in a mask and, last, where it ends.
        searched: uint64 (n_words,), the bits to search.
    """
    groups = []
    for start, stop in pairwise(offsets.tolist()):
        at = slice(start // WORD_BITS, n_words_for(stop))
        inside = searched[at].copy()
        if len(inside):
            inside[0] &= ~np.uint64(0) << np.uint64(start % WORD_BITS)
            inside[-1] &= ~np.uint64(0) >> np.uint64(-stop % WORD_BITS)
        n_searched = int(np.bitwise_count(inside).sum())
        if n_searched:
            groups.append(SearchedGroup(start, at, inside, n_searched))
    return groups


def words_with(group: SearchedGroup, bits: np.ndarray) -> np.ndarray:
    """Words of a group in which the given bits are 1, counted from the first bit of the first word."""
    marks = np.zeros((1, group.n_bits), dtype=bool)
    # numpy is slow at assigning by other integers than its own.
    marks[0, bits.astype(np.intp)] = True
    return pack_rows(marks)[0]
