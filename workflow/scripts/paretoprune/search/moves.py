"""Crossover and moves of packed masks: functions on words that take a random generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.random import Generator

from paretoprune.masks.packed import WORD_BITS
from paretoprune.search.groups import Orders, SearchedGroup, words_with
from paretoprune.search.sampling import random_words

# Uniform noise of width sqrt(12) has standard deviation 1. It is drawn five times as fast as normal noise, and it is
# bounded, so that most bits need no noise at all (see `_Candidates.flip`).
UNIT_WIDTH = np.sqrt(12.0)


def uniform_crossover(first: np.ndarray, second: np.ndarray, rng: Generator) -> np.ndarray:
    """Each bit from either parent; all uint64 (n_words,)."""
    child = rng.integers(0, 2**64, size=len(first), dtype=np.uint64)
    child &= first ^ second
    child ^= first
    return child


def flip_bits(words: np.ndarray, n_bits: int, rate: float, rng: Generator) -> None:
    """Flip each bit with probability `rate`, at least one of them, in place.

    Args:
        words: uint64 (n_words,), changed in place.
        n_bits: Bits in use.
        rate: Probability, 0 to 1.
        rng: Random generator.
    """
    # Up to a share of 1/50, numpy draws positions without a pass over all of them; 1/64 is safely below.
    if rate <= 1 / WORD_BITS:
        n_flips = max(1, int(rng.binomial(n_bits, rate)))
        at = rng.choice(n_bits, size=n_flips, replace=False, shuffle=False)
        np.bitwise_xor.at(words, at // WORD_BITS, np.uint64(1) << (at % WORD_BITS).astype(np.uint64))
        return
    flips = random_words(n_bits, rate, rng)
    words ^= flips
    if not flips.any():
        # A rate of 0 flips exactly one bit.
        flip_bits(words, n_bits, 0.0, rng)


def one_point_crossover(
    first: np.ndarray, second: np.ndarray, groups: Sequence[SearchedGroup], rng: Generator
) -> np.ndarray:
    """Take the groups before a random boundary from one parent, and the others from the other parent.

    Which parent comes first is random too. Bits that were tuned together inside a group stay together. An evaluator
    that has seen the first parent knows the child's activations up to the boundary.

    Args:
        first: uint64 (n_words,), a parent.
        second: uint64 (n_words,), the other.
        groups: The groups with searched bits. With a single one the child is a copy of a parent.
        rng: Random generator.

    Returns:
        uint64 (n_words,).
    """
    if rng.random() < 0.5:
        first, second = second, first
    if len(groups) < 2:
        return first.copy()
    word, bit = divmod(groups[int(rng.integers(1, len(groups)))].start, WORD_BITS)
    child = np.concatenate([first[:word], second[word:]])
    # The word at the boundary, if the boundary lies inside one: its low bits are those of the first parent.
    if bit:
        child[word] ^= (first[word] ^ second[word]) & ((np.uint64(1) << np.uint64(bit)) - np.uint64(1))
    return child


def _is_lowest(keys: np.ndarray, n: int) -> np.ndarray:
    """Whether each key is among the `n` lowest, bool (n_keys,), exactly n times true; of equal keys the first count."""
    if n >= len(keys):
        return np.ones(len(keys), dtype=bool)
    # Partitioning values and comparing them is faster than `argpartition`.
    limit = np.partition(keys, n - 1)[n - 1]
    chosen = keys <= limit
    surplus = int(np.count_nonzero(chosen)) - n
    if surplus:
        chosen[np.flatnonzero(keys == limit)[-surplus:]] = False
    return chosen


class _Candidates:
    """The bits that a move may flip in a few groups: ones, least important first, or zeros, most important first.

    Throughout, a *position* is a bit's place in the order of its group, from 0 for the bit to flip first. It gives the
    bit's coordinate (position + 0.5) / n_searched.

    Args:
        words: uint64 (n_words,).
        groups: The groups with searched bits.
        orders: The order of their bits.
        chosen: Indices of the groups.
        value: Whether the candidates are the ones (true) or the zeros.
    """

    def __init__(
        self,
        words: np.ndarray,
        groups: Sequence[SearchedGroup],
        orders: Orders,
        chosen: Sequence[int],
        *,
        value: bool,
    ) -> None:
        self._groups = [groups[k] for k in chosen]
        self._orders = [orders[k] if value else orders[k][::-1] for k in chosen]
        self._bits = [group.select(words, value=value) for group in self._groups]
        self._n_bits = sum(int(np.count_nonzero(bits)) for bits in self._bits)

    @property
    def max_flips(self) -> int:
        """Half of the bits (rounded up), so that no move empties or fills its groups; one bit may always flip."""
        return (self._n_bits + 1) // 2

    def flip(self, words: np.ndarray, n: int, softness: float, rng: Generator) -> None:
        """Flip the first `n` bits in the order of their coordinates plus noise, in place."""
        width = softness * UNIT_WIDTH
        positions = self._first_positions(n, width)
        sizes = [group.n_searched for group in self._groups]
        # Let c be the n-th lowest coordinate, without noise; it lies between low and high. Noise lies between 0 and
        # `width`, so the n-th lowest noisy coordinate lies between c and c + width. Bits whose coordinate is below
        # c - width stay below c with any noise: they flip. Bits above c + width do not. Only the bits in between need
        # noise, a small part of all where noise is small.
        low, high = self._bracket(positions, n)
        # A coordinate x is reached at the position x * size - 0.5.
        n_sure = [int(own.searchsorted((low - width) * size - 0.5)) for own, size in zip(positions, sizes, strict=True)]
        ends = [int(own.searchsorted((high + width) * size - 0.5)) for own, size in zip(positions, sizes, strict=True)]
        unsure = [own[i:j] for own, i, j in zip(positions, n_sure, ends, strict=True)]
        noisy = rng.random(sum(map(len, unsure)), dtype=np.float32)
        noisy *= np.float32(width)
        start = 0
        for own, size in zip(unsure, sizes, strict=True):
            noisy[start : start + len(own)] += (own + 0.5) * (1 / size)
            start += len(own)
        flips = _is_lowest(noisy, n - sum(n_sure))
        start = 0
        for group, order, own, i, rest in zip(self._groups, self._orders, positions, n_sure, unsure, strict=True):
            drawn = rest.take(flips[start : start + len(rest)].nonzero()[0])
            start += len(rest)
            words[group.word_slice] ^= words_with(group, order.take(np.concatenate([own[:i], drawn])))

    def _bracket(self, positions: Sequence[np.ndarray], n: int) -> tuple[float, float]:
        """Two coordinates close to each other, between which the `n`-th lowest coordinate of the bits lies.

        Args:
            positions: Of the bits of each group, rising; enough of them to hold the first n of all.
            n: At least 1.
        """
        # Sorting all coordinates would give the n-th lowest itself, but slowly. So only every step-th bit of each group
        # is sorted, a marker for itself and the step - 1 bits before it.
        step = 1 + n // 256
        markers = np.sort(
            np.concatenate(
                [
                    (own[step - 1 : n : step] + 0.5) / len(order)
                    for own, order in zip(positions, self._orders, strict=True)
                ]
            )
        )
        # Up to the k-th marker (from 1) there are at least k * step bits, those that the k markers stand for. With
        # k = ceil(n / step) these are n or more: the n-th bit lies at that marker or before it.
        above = -(-n // step) - 1
        # Before the k-th marker there are k - 1 markers. They stand for (k - 1) * step bits, and each group has at most
        # step - 1 further bits before its next marker: at most (k - 1) * step + (step - 1) * n_groups bits in all.
        # While that is less than n, the n-th bit lies at the k-th marker or behind it. `below` is k - 1 of the last
        # such marker.
        below = (n - 1 - (step - 1) * len(positions)) // step
        # Coordinates are rounded differently here and in `flip`.
        slack = 1e-9
        return (
            float(markers[below]) - slack if below >= 0 else 0.0,
            float(markers[above]) + slack if above < len(markers) else 1.0,
        )

    def _first_positions(self, n: int, margin: float) -> list[np.ndarray]:
        """Find the positions of the first `n` of all bits, and of those within `margin` after them.

        Args:
            n: At most the number of bits.
            margin: In coordinates.

        Returns:
            For each group int (n_positions,), rising; further positions may be among them.
        """
        # If the bits lay evenly in the orders, the n-th would be at the coordinate n / n_bits. Twice as far is enough
        # for most masks; where it is not, the distance is doubled until it is. So large groups are not read to the end.
        distance = margin + 2 * n / self._n_bits
        while True:
            positions = [
                bits.take(order[: ceil(distance * len(order))]).nonzero()[0]
                for bits, order in zip(self._bits, self._orders, strict=True)
            ]
            if distance >= 1:
                return positions
            without_margin = distance - margin
            n_found = sum(
                int(own.searchsorted(without_margin * len(order) - 0.5))
                for own, order in zip(positions, self._orders, strict=True)
            )
            if n_found >= n:
                return positions
            distance *= 2


@dataclass(frozen=True)
class Moves:
    """Moves along a ranking: drop the least important bits, grow the most important ones, or swap as many of both.

    A move flips at most half (rounded up) of the bits that it could flip in its groups. So it never empties or fills
    them.

    Attributes:
        groups: The groups with searched bits.
        orders: The order of their bits from the least to the most important, at least for groups that moves change.
        softness: Standard deviation of the noise on coordinates, which makes repeated moves differ. The noise is
            uniform: a bit is never dropped in place of one whose coordinate is lower by more than 2 sqrt(3) = 3.5
            standard deviations.
    """

    groups: Sequence[SearchedGroup]
    orders: Orders
    softness: float

    def drop(self, words: np.ndarray, chosen: Sequence[int], n: int, rng: Generator) -> int:
        """Clear the least important of the searched ones of some groups, in place.

        Args:
            words: uint64 (n_words,), changed in place.
            chosen: Indices of the groups that may change.
            n: How many to clear at most.
            rng: Random generator.

        Returns:
            How many were cleared; 0 if the groups have no searched ones.
        """
        return self._flip(words, self._candidates(words, chosen, value=True), n, rng)

    def grow(self, words: np.ndarray, chosen: Sequence[int], n: int, rng: Generator) -> int:
        """Set the most important of the searched zeros of some groups, in place; arguments and result as for `drop`."""
        return self._flip(words, self._candidates(words, chosen, value=False), n, rng)

    def swap(self, words: np.ndarray, drop_in: Sequence[int], grow_in: Sequence[int], n: int, rng: Generator) -> int:
        """Drop in some groups and grow as many in some groups, in place, so that the total density stays.

        Args:
            words: uint64 (n_words,), changed in place.
            drop_in: Indices of the groups that may lose bits.
            grow_in: Indices of the groups that may gain bits; they may be the same ones.
            n: How many pairs to swap at most.
            rng: Random generator.

        Returns:
            How many pairs were swapped.
        """
        # Zeros are looked up before the drop, so that no bit is dropped and then grown again.
        ones, zeros = self._candidates(words, drop_in, value=True), self._candidates(words, grow_in, value=False)
        n = min(n, ones.max_flips, zeros.max_flips)
        if n > 0:
            ones.flip(words, n, self.softness, rng)
            zeros.flip(words, n, self.softness, rng)
        return n

    def _candidates(self, words: np.ndarray, chosen: Sequence[int], *, value: bool) -> _Candidates:
        return _Candidates(words, self.groups, self.orders, chosen, value=value)

    def _flip(self, words: np.ndarray, candidates: _Candidates, n: int, rng: Generator) -> int:
        n = min(n, candidates.max_flips)
        if n > 0:
            candidates.flip(words, n, self.softness, rng)
        return n
