"""The searched bits of each group, their order, and the words that hold them.

Words are one row of `masks.packed.pack_rows`, uint64 (n_words,), in mask order. Samples and moves follow a *ranking*:
the searched bits of each group from the least to the most important. The i-th (from 0) of the n searched bits of a
group has the *coordinate* (i + 0.5) / n, so that groups of different sizes can be compared.
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
        word_slice: The words that hold its bits. The first and the last one may hold bits of other groups too.
        searched: uint64 (n_words_of_the_group,), the searched bits of the group; all other bits are 0.
        n_searched: Number of searched bits.
    """

    start: int
    word_slice: slice
    searched: np.ndarray
    n_searched: int

    @property
    def n_bits(self) -> int:
        """Number of bits in the words of `word_slice`, bits of other groups included."""
        return len(self.searched) * WORD_BITS

    def select(self, words: np.ndarray, *, value: bool) -> np.ndarray:
        """Which searched bits have the value in a mask's words, bool (n_bits,)."""
        own = words[self.word_slice]
        return unpack_row(self.searched & (own if value else ~own), self.n_bits)

    def rank(self, scores: np.ndarray) -> np.ndarray:
        """Order the searched bits from the least to the most important; of equal ones the first comes first.

        Args:
            scores: float (n_units,), higher = keep.

        Returns:
            int32 (n_searched,), positions counted from the first bit of `word_slice`.
        """
        bits = np.flatnonzero(unpack_row(self.searched, self.n_bits))
        order = np.argsort(scores[bits + self.word_slice.start * WORD_BITS], kind="stable")
        return bits[order].astype(np.int32)


# One array per searched group, see `SearchedGroup.rank`.
Ranking = Sequence[np.ndarray]
# A ranking that depends on the candidate: from a mask's words, uint64 (n_words,), and indices of searched groups to the
# order of the bits of each of these groups.
CandidateRanking = Callable[[np.ndarray, Sequence[int]], Mapping[int, np.ndarray]]
# The order of each group's bits by the index of the group, as moves look it up.
Orders = Ranking | Mapping[int, np.ndarray]


def searched_groups(offsets: np.ndarray, searched: np.ndarray) -> list[SearchedGroup]:
    """Find the groups that have bits to search.

    Args:
        offsets: int (n_groups + 1,), where each group starts in a mask and, last, where it ends.
        searched: uint64 (n_words,), the bits to search.
    """
    groups = []
    for start, stop in pairwise(offsets.tolist()):
        word_slice = slice(start // WORD_BITS, n_words_for(stop))
        own = searched[word_slice].copy()
        if len(own):
            # Clear the bits of the group before in the first word, and those of the group after in the last one.
            own[0] &= ~np.uint64(0) << np.uint64(start % WORD_BITS)
            own[-1] &= ~np.uint64(0) >> np.uint64(-stop % WORD_BITS)
        n_searched = int(np.bitwise_count(own).sum())
        if n_searched:
            groups.append(SearchedGroup(start, word_slice, own, n_searched))
    return groups


def words_with(group: SearchedGroup, bits: np.ndarray) -> np.ndarray:
    """Words of a group in which exactly the given bits are 1.

    Args:
        group: The group.
        bits: int (n,), positions counted from the first bit of the group's `word_slice`.

    Returns:
        uint64 (n_words_of_the_group,).
    """
    row = np.zeros((1, group.n_bits), dtype=bool)
    # numpy assigns several times faster by indices of its own integer type.
    row[0, bits.astype(np.intp)] = True
    return pack_rows(row)[0]
