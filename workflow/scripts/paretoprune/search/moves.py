"""Crossover and moves of packed masks: functions on words that take a random generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.random import Generator

from paretoprune.masks.packed import WORD_BITS
from paretoprune.search.groups import Orders, SearchedGroup, words_with
from paretoprune.search.sampling import random_words

# Uniform noise of width sqrt(12) has standard deviation 1. It costs a fifth of normal noise, and has an end.
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
    # numpy draws few positions out of many without a pass over all of them, but only up to a fiftieth.
    if rate <= 1 / WORD_BITS:
        n_flips = max(1, int(rng.binomial(n_bits, rate)))
        at = rng.choice(n_bits, size=n_flips, replace=False, shuffle=False)
        np.bitwise_xor.at(words, at // WORD_BITS, np.uint64(1) << (at % WORD_BITS).astype(np.uint64))
        return
    flips = random_words(n_bits, rate, rng)
    words ^= flips
    if not flips.any():
        flip_bits(words, n_bits, 0.0, rng)


def one_point_crossover(
    first: np.ndarray, second: np.ndarray, groups: Sequence[SearchedGroup], rng: Generator
) -> np.ndarray:
    """The groups before a random one from one parent, those from it on from the other; which is which is random too.

    What was tuned inside a group stays together, and an evaluator that has seen the one parent knows the child's
    activations up to the boundary.

    Args:
        first: uint64 (n_words,), a parent.
        second: uint64 (n_words,), the other.
        groups: The groups with searched bits, from `searched_groups`. With a single one the child is a parent.
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
    if bit:
        child[word] ^= (first[word] ^ second[word]) & ((np.uint64(1) << np.uint64(bit)) - np.uint64(1))
    return child


def _lowest(keys: np.ndarray, n: int) -> np.ndarray:
    """Marks exactly the `n` lowest keys, bool; of equal ones the first."""
    if n >= len(keys):
        return np.ones(len(keys), dtype=bool)
    # To partition values and compare is faster than to partition positions.
    limit = np.partition(keys, n - 1)[n - 1]
    chosen = keys <= limit
    surplus = int(np.count_nonzero(chosen)) - n
    if surplus:
        chosen[np.flatnonzero(keys == limit)[-surplus:]] = False
    return chosen


class _Candidates:
    """The bits that a move may flip in a few groups: ones, least important first, or zeros, most important first.

    Args:
        words: uint64 (n_words,).
        groups: The groups with searched bits.
        orders: Of their bits.
        chosen: Indices of the groups.
        value: The ones (true) or the zeros.
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
    def limit(self) -> int:
        """Half of the bits (rounded up), so that no move empties or fills its groups; one bit may always flip."""
        return (self._n_bits + 1) // 2

    def flip(self, words: np.ndarray, n: int, softness: float, rng: Generator) -> None:
        """Flip the first `n` bits in the order of their coordinates with noise, in place."""
        width = softness * UNIT_WIDTH
        places = self._nearest(n, width)
        sizes = [group.n_searched for group in self._groups]
        low, high = self._bracket(places, n)
        # Noise lies between 0 and `width`: what is more than that before the n-th coordinate is in, what is more than
        # that after it is out, and only for what is between it must be drawn.
        sure = [int(at.searchsorted((low - width) * size - 0.5)) for at, size in zip(places, sizes, strict=True)]
        last = [int(at.searchsorted((high + width) * size - 0.5)) for at, size in zip(places, sizes, strict=True)]
        between = [at[i:j] for at, i, j in zip(places, sure, last, strict=True)]
        noisy = rng.random(sum(map(len, between)), dtype=np.float32)
        noisy *= np.float32(width)
        start = 0
        for at, size in zip(between, sizes, strict=True):
            noisy[start : start + len(at)] += (at + 0.5) * (1 / size)
            start += len(at)
        drawn = _lowest(noisy, n - sum(sure))
        start = 0
        for group, order, at, i, some in zip(self._groups, self._orders, places, sure, between, strict=True):
            marked = some.take(drawn[start : start + len(some)].nonzero()[0])
            start += len(some)
            words[group.at] ^= words_with(group, order.take(np.concatenate([at[:i], marked])))

    def _bracket(self, places: Sequence[np.ndarray], n: int) -> tuple[float, float]:
        """Two coordinates close to each other, between which the `n`-th of the bits lies."""
        # Every so many bits of each group stand for those before them: by the k-th of all such marks there are at least
        # k steps of bits, and before it at most k - 1 steps and less than one more in each group.
        step = 1 + n // 256
        marks = np.sort(
            np.concatenate(
                [(at[step - 1 : n : step] + 0.5) / len(order) for at, order in zip(places, self._orders, strict=True)]
            )
        )
        above = -(-n // step) - 1
        below = (n - 1 - (step - 1) * len(places)) // step
        slack = 1e-9
        return (
            float(marks[below]) - slack if below >= 0 else 0.0,
            float(marks[above]) + slack if above < len(marks) else 1.0,
        )

    def _nearest(self, n: int, margin: float) -> list[np.ndarray]:
        """Where along the order of each group the bits are: the first `n` of all, and what follows within `margin`."""
        # As far as it would be if they were spread evenly, and farther where they are not.
        far = margin + 2 * n / self._n_bits
        while True:
            places = [
                bits.take(order[: ceil(far * len(order))]).nonzero()[0]
                for bits, order in zip(self._bits, self._orders, strict=True)
            ]
            if far >= 1:
                return places
            near = far - margin
            n_near = sum(
                int(at.searchsorted(near * len(order) - 0.5)) for at, order in zip(places, self._orders, strict=True)
            )
            if n_near >= n:
                return places
            far *= 2


@dataclass(frozen=True)
class Moves:
    """Moves along a ranking: drop what matters least, grow what matters most, or swap both at constant density.

    No move changes more than half of the bits that its groups offer (rounded up), so none empties or fills them.

    Attributes:
        groups: The groups with searched bits.
        orders: Of their bits, from the least to the most important; of those groups at least that a move may change.
        softness: Standard deviation of the noise on the coordinates, in their unit, so that repeated moves differ. The
            noise is uniform: no bit is dropped in place of one whose coordinate is 2 sqrt(3) = 3.5 of these below it.
    """

    groups: Sequence[SearchedGroup]
    orders: Orders
    softness: float

    def drop(self, words: np.ndarray, chosen: Sequence[int], n: int, rng: Generator) -> int:
        """Clear the searched ones of some groups that matter least, in place.

        Args:
            words: uint64 (n_words,), changed in place.
            chosen: Indices of the groups that may change.
            n: How many to clear at most.
            rng: Random generator.

        Returns:
            How many were cleared; 0 where there was no one.
        """
        return self._flip(words, self._side(words, chosen, value=True), n, rng)

    def grow(self, words: np.ndarray, chosen: Sequence[int], n: int, rng: Generator) -> int:
        """Set the searched zeros of some groups that matter most, in place; arguments and result as for `drop`."""
        return self._flip(words, self._side(words, chosen, value=False), n, rng)

    def swap(self, words: np.ndarray, drop_in: Sequence[int], grow_in: Sequence[int], n: int, rng: Generator) -> int:
        """Clear ones of the groups `drop_in` and set as many zeros of the groups `grow_in`, in place.

        Other arguments as for `drop`.

        Returns:
            How many pairs were swapped.
        """
        # Both are looked up before either moves: what is dropped is not grown again.
        ones, zeros = self._side(words, drop_in, value=True), self._side(words, grow_in, value=False)
        n = min(n, ones.limit, zeros.limit)
        if n > 0:
            ones.flip(words, n, self.softness, rng)
            zeros.flip(words, n, self.softness, rng)
        return n

    def _side(self, words: np.ndarray, chosen: Sequence[int], *, value: bool) -> "_Candidates":
        return _Candidates(words, self.groups, self.orders, chosen, value=value)

    def _flip(self, words: np.ndarray, side: "_Candidates", n: int, rng: Generator) -> int:
        n = min(n, side.limit)
        if n > 0:
            side.flip(words, n, self.softness, rng)
        return n
