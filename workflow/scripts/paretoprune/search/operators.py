"""Sampling and variation of packed masks: functions on words that take a random generator.

Words are one row of `masks.pack_rows`, uint64 (n_words,), in mask order. What guides them is a *ranking*:
the searched bits of each layer from the least to the most important, see `Corridor.rank`. Number i of the n searched
bits of a layer has the *coordinate* (i + 0.5) / n in it, so that layers of different sizes can be compared.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, exp, log

import numpy as np
from numpy.random import Generator

from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import WORD_BITS, n_words_for, pack_rows, unpack_row

# Uniform noise of width sqrt(12) has standard deviation 1. It costs a fifth of normal noise, and has an end.
UNIT_WIDTH = np.sqrt(12.0)
# Precision of the probabilities in `random_words`, in binary digits.
PROBABILITY_BITS = 24


@dataclass(frozen=True)
class SearchedLayer:
    """The searched bits of one layer, and which words hold them.

    Attributes:
        start: First bit of the layer in a mask.
        at: The words that hold its bits; the outer two may be shared with the layers beside it.
        searched: uint64 (n_words_of_the_layer,), its searched bits; those of other layers are 0.
        n_searched: How many there are.
    """

    start: int
    at: slice
    searched: np.ndarray
    n_searched: int

    @property
    def n_bits(self) -> int:
        """Bits of the words that hold it, those of other layers included."""
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


# One array per searched layer, see `SearchedLayer.rank`.
Ranking = Sequence[np.ndarray]
# From a mask's words, uint64 (n_words,), and indices of searched layers to the order of the bits of each, as it is for
# that mask.
MovingRanking = Callable[[np.ndarray, Sequence[int]], Mapping[int, np.ndarray]]
# What a move looks up the order of a layer's bits in.
Orders = Ranking | Mapping[int, np.ndarray]


def searched_layers(layer_offsets: np.ndarray, searched: np.ndarray) -> list[SearchedLayer]:
    """The layers that have bits to search.

    Args:
        layer_offsets: int (n_layers + 1,), where each layer starts in a mask and, last, where it ends.
        searched: uint64 (n_words,), the bits to search.
    """
    layers = []
    for start, stop in pairwise(layer_offsets.tolist()):
        at = slice(start // WORD_BITS, n_words_for(stop))
        inside = searched[at].copy()
        if len(inside):
            inside[0] &= ~np.uint64(0) << np.uint64(start % WORD_BITS)
            inside[-1] &= ~np.uint64(0) >> np.uint64(-stop % WORD_BITS)
        n_searched = int(np.bitwise_count(inside).sum())
        if n_searched:
            layers.append(SearchedLayer(start, at, inside, n_searched))
    return layers


# Sampling


def keep_probabilities(n_bits: int, density: float, softness: float) -> np.ndarray:
    """Probability of each bit of a layer to be 1: a logistic step along its ranking whose mean is `density`.

    Args:
        n_bits: Searched bits of the layer.
        density: Expected share of ones, 0 to 1.
        softness: Width of the step in coordinates; near 0 the best are kept for sure, large values ignore the ranking.

    Returns:
        float32 (n_bits,), rising.
    """
    density = float(np.clip(density, 1e-9, 1 - 1e-9))
    # The centre c that solves: integral over x from 0 to 1 of 1 / (1 + exp((c - x) / softness)) = density.
    centre = 1 - density + softness * np.log(np.expm1(-(1 - density) / softness) / np.expm1(-density / softness))
    coordinate = (np.arange(n_bits, dtype=np.float32) + 0.5) / n_bits
    return 1 / (1 + np.exp(np.clip((centre - coordinate) / softness, -50, 50)))


def sample_bernoulli(
    layers: Sequence[SearchedLayer],
    ranking: Ranking,
    lower: np.ndarray,
    densities: Sequence[float],
    softness: float,
    rng: Generator,
) -> Iterator[np.ndarray]:
    """Draw one mask per density, each searched bit by its own probability, which rises with importance.

    Args:
        layers: The layers with searched bits.
        ranking: Of their bits.
        lower: uint64 (n_words,), the bits that are 1 in any case.
        densities: Expected share of ones among the searched bits, 0 to 1.
        softness: Width of the step, see `keep_probabilities`.
        rng: Random generator.

    Yields:
        uint64 (n_words,), one mask after the other.
    """
    for density in densities:
        words = lower.copy()
        for layer, order in zip(layers, ranking, strict=True):
            drawn = rng.random(len(order), dtype=np.float32) < keep_probabilities(len(order), density, softness)
            words[layer.at] |= _spread(layer, order[drawn])
        yield words


def _spread(layer: SearchedLayer, bits: np.ndarray) -> np.ndarray:
    """Words of a layer in which the given bits are 1, counted from the first bit of the first word."""
    marks = np.zeros((1, layer.n_bits), dtype=bool)
    # numpy is slow at assigning by other integers than its own.
    marks[0, bits.astype(np.intp)] = True
    return pack_rows(marks)[0]


def random_words(n_bits: int, probability: float, rng: Generator) -> np.ndarray:
    """Words whose bits are 1 with `probability`, rounded to 24 binary digits; uint64 (n_words,), padding 0."""
    digits = round(probability * 2**PROBABILITY_BITS)
    if digits == 2**PROBABILITY_BITS:
        words = np.full(n_words_for(n_bits), ~np.uint64(0))
    else:
        words = np.zeros(n_words_for(n_bits), dtype=np.uint64)
        # From the lowest binary digit of the probability up, "or" halves the chance of a 0 and "and" that of a 1.
        for place in range(PROBABILITY_BITS):
            digit = digits >> place & 1
            # Nothing to halve below the lowest 1.
            if digits & ((2 << place) - 1):
                coins = rng.integers(0, 2**64, size=len(words), dtype=np.uint64)
                (np.bitwise_or if digit else np.bitwise_and)(words, coins, out=words)
    words[-1] &= ~np.uint64(0) >> np.uint64(-n_bits % WORD_BITS)
    return words


def sample_blind(n_bits: int, densities: Sequence[float], rng: Generator) -> Iterator[np.ndarray]:
    """Draw one mask per density, all bits alike; yields uint64 (n_words,)."""
    return (random_words(n_bits, density, rng) for density in densities)


# Crossover and mutation without guidance


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


# In a few layers


def one_point_crossover(
    first: np.ndarray, second: np.ndarray, layers: Sequence[SearchedLayer], rng: Generator
) -> np.ndarray:
    """The layers before a random one from one parent, those from it on from the other; which is which is random too.

    What was tuned inside a layer stays together, and an evaluator that has seen the one parent knows the child's
    activations up to the boundary.

    Args:
        first: uint64 (n_words,), a parent.
        second: uint64 (n_words,), the other.
        layers: The layers with searched bits, from `searched_layers`. With a single one the child is a parent.
        rng: Random generator.

    Returns:
        uint64 (n_words,).
    """
    if rng.random() < 0.5:
        first, second = second, first
    if len(layers) < 2:
        return first.copy()
    word, bit = divmod(layers[int(rng.integers(1, len(layers)))].start, WORD_BITS)
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


class _Side:
    """The bits that a move may flip in a few layers: ones, least important first, or zeros, most important first.

    Args:
        words: uint64 (n_words,).
        layers: The layers with searched bits.
        ranking: Of their bits.
        chosen: Indices of the layers.
        value: The ones (true) or the zeros.
    """

    def __init__(
        self,
        words: np.ndarray,
        layers: Sequence[SearchedLayer],
        ranking: Orders,
        chosen: Sequence[int],
        *,
        value: bool,
    ) -> None:
        self._layers = [layers[k] for k in chosen]
        self._orders = [ranking[k] if value else ranking[k][::-1] for k in chosen]
        self._bits = [layer.select(words, value=value) for layer in self._layers]
        self._n_bits = sum(int(np.count_nonzero(bits)) for bits in self._bits)

    @property
    def limit(self) -> int:
        """Half of the bits (rounded up), so that no move empties or fills its layers; one bit may always flip."""
        return (self._n_bits + 1) // 2

    def flip(self, words: np.ndarray, n: int, softness: float, rng: Generator) -> None:
        """Flip the first `n` bits in the order of their coordinates with noise, in place."""
        width = softness * UNIT_WIDTH
        places = self._nearest(n, width)
        sizes = [layer.n_searched for layer in self._layers]
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
        for layer, order, at, i, some in zip(self._layers, self._orders, places, sure, between, strict=True):
            marked = some.take(drawn[start : start + len(some)].nonzero()[0])
            start += len(some)
            words[layer.at] ^= _spread(layer, order.take(np.concatenate([at[:i], marked])))

    def _bracket(self, places: Sequence[np.ndarray], n: int) -> tuple[float, float]:
        """Two coordinates close to each other, between which the `n`-th of the bits lies."""
        # Every so many bits of each layer stand for those before them: by the k-th of all such marks there are at least
        # k steps of bits, and before it at most k - 1 steps and less than one more in each layer.
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
        """Where along the order of each layer the bits are: the first `n` of all, and what follows within `margin`."""
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


def drop(
    words: np.ndarray,
    layers: Sequence[SearchedLayer],
    ranking: Orders,
    chosen: Sequence[int],
    n: int,
    softness: float,
    rng: Generator,
) -> int:
    """Clear the searched ones of some layers that matter least, in place.

    Args:
        words: uint64 (n_words,), changed in place.
        layers: The layers with searched bits.
        ranking: Of their bits.
        chosen: Indices of the layers that may change.
        n: How many to clear; never more than half of the ones there (rounded up), so that no move empties its layers.
        softness: Standard deviation of the noise on the coordinates, in their unit, so that repeated drops differ. The
            noise is uniform: no bit is dropped in place of one whose coordinate is 2 sqrt(3) = 3.5 of these below it.
        rng: Random generator.

    Returns:
        How many were cleared; 0 where there was no one.
    """
    return _move(_Side(words, layers, ranking, chosen, value=True), words, n, softness, rng)


def grow(
    words: np.ndarray,
    layers: Sequence[SearchedLayer],
    ranking: Orders,
    chosen: Sequence[int],
    n: int,
    softness: float,
    rng: Generator,
) -> int:
    """Set the searched zeros of some layers that matter most, in place; arguments and result as for `drop`."""
    return _move(_Side(words, layers, ranking, chosen, value=False), words, n, softness, rng)


def _move(side: _Side, words: np.ndarray, n: int, softness: float, rng: Generator) -> int:
    n = min(n, side.limit)
    if n > 0:
        side.flip(words, n, softness, rng)
    return n


def swap(
    words: np.ndarray,
    layers: Sequence[SearchedLayer],
    ranking: Orders,
    drop_in: Sequence[int],
    grow_in: Sequence[int],
    n: int,
    softness: float,
    rng: Generator,
) -> int:
    """Clear ones of the layers `drop_in` and set as many zeros of the layers `grow_in`, in place: the density stays.

    No more than half of these ones and half of these zeros; other arguments as for `drop`.

    Returns:
        How many pairs were swapped.
    """
    # Both are looked up before either moves: what is dropped is not grown again.
    ones = _Side(words, layers, ranking, drop_in, value=True)
    zeros = _Side(words, layers, ranking, grow_in, value=False)
    n = min(n, ones.limit, zeros.limit)
    if n > 0:
        ones.flip(words, n, softness, rng)
        zeros.flip(words, n, softness, rng)
    return n


# Along a ladder of densities


def nearest_rungs(densities: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """The rung of a ladder that is nearest to each density, in the logarithm; int64, the shape of `densities`.

    Args:
        densities: Any shape, 0 to 1.
        rungs: float (n_rungs,), rising, above 0.
    """
    between = np.sqrt(rungs[1:] * rungs[:-1])
    return np.searchsorted(between, densities, side="left")


def switch_levels(levels: np.ndarray, n_kept: np.ndarray, rng: Generator) -> np.ndarray:
    """Move one layer up or down its ladder, and others the other way until the total is about what it was.

    Args:
        levels: int (n_layers,), the rung of each layer.
        n_kept: int (n_layers, n_rungs), weights of each layer on each rung, rising.
        rng: Random generator.

    Returns:
        int (n_layers,), new levels. The total differs by no more than one step of the layer that moved first.

    Source:
        Sieberling et al., "EvoPress: Accurate dynamic model compression via evolutionary search", ICML 2025, section 3.
    """
    found = levels.copy()
    direction = 1 if rng.random() < 0.5 else -1
    top = n_kept.shape[1] - 1
    able = np.flatnonzero((levels + direction >= 0) & (levels + direction <= top))
    if not len(able):
        return found
    first = int(rng.choice(able))
    found[first] += direction
    owed = direction * int(n_kept[first, found[first]] - n_kept[first, levels[first]])
    for layer in rng.permutation(len(levels)):
        level = found[layer] - direction
        if owed <= 0:
            break
        if layer == first or not 0 <= level <= top:
            continue
        paid = direction * int(n_kept[layer, found[layer]] - n_kept[layer, level])
        # Paying back more than twice what is owed would leave the total farther off than before.
        if paid <= 2 * owed:
            found[layer] = level
            owed -= paid
    return found


def _draw(reach: Sequence[float], rng: Generator, first: int = 0) -> int:
    """An index from `first` on, drawn with the weights whose cumulative sum is `reach`."""
    before = reach[first - 1] if first else 0.0
    drawn = before + rng.random() * (reach[-1] - before)
    # Rounding must not carry it beyond either end.
    return min(max(bisect_right(reach, drawn), first), len(reach) - 1)


MOVES = ("drop", "grow", "swap")


@dataclass
class _Arm:
    """One kind of move along one importance score, with what is known of its success."""

    move: str
    ranking: Ranking | MovingRanking
    log_rate: float
    successes: float = 0.0
    trials: float = 0.0


@dataclass
class AdaptiveVariation:
    """Drop, grow and swap moves along importance, whose choice and size follow their success.

    An *arm* is one move along one ranking. An arm is drawn with probability proportional to its recent share of
    successes (Laplace-smoothed, never below `floor`); the share of bits that it moves is drawn log-normally around a
    rate that is pulled towards the rates that succeeded. Success is told afterwards, by genome, through `reward`, so
    that any algorithm can use the operator unmodified.

    A move touches a layer and perhaps some later ones, and costs no more than these. Everything before its first layer
    stays as it was, so that an evaluator can reuse the activations up to there.

    Attributes:
        layers: The layers with searched bits, from `searched_layers`.
        rankings: One or more, to move along; some may depend on the mask that is varied.
        softness: Noise on coordinates, see `drop`.
        first_rate: Share of all searched bits that a move changes, before anything is learnt. What the touched layers
            have to offer caps it, see `drop`.
        floor: Smallest probability of an arm, as a share of the uniform one.
        memory: Factor by which older evidence fades with each further outcome of the same arm.
        adaptive: Whether to learn at all; otherwise arms stay equally likely and their rates where they started.

    Source:
        Probability matching: Thierens, "An adaptive pursuit strategy for allocating operator probabilities", 2005. The
        arms, the success signal and the adaptation of rates are our own.
    """

    layers: Sequence[SearchedLayer]
    rankings: Sequence[Ranking | MovingRanking]
    softness: float = 0.05
    first_rate: float = 0.02
    floor: float = 0.2
    memory: float = 0.95
    adaptive: bool = True
    _pending: dict[bytes, tuple[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        first = log(self.first_rate)
        self._arms = [_Arm(move, ranking, first) for ranking in self.rankings for move in MOVES]
        self._n_searched = sum(layer.n_searched for layer in self.layers)
        # Larger layers hold more of what there is to gain, but not in proportion.
        self._reach = np.cumsum(np.sqrt([layer.n_searched for layer in self.layers])).tolist()

    def probabilities(self) -> np.ndarray:
        """Probability of each arm, float (n_arms,)."""
        quality = np.array([(arm.successes + 1) / (arm.trials + 2) for arm in self._arms])
        return self.floor / len(quality) + (1 - self.floor) * quality / quality.sum()

    def vary(self, genomes: Sequence[Genome], rng: Generator) -> list[Genome]:
        """Apply one move to each genome, which changes at least one bit; drafts are used up.

        Args:
            genomes: What to vary.
            rng: Random generator.
        """
        reach = np.cumsum(self.probabilities()).tolist()
        children = []
        for genome in genomes:
            index = _draw(reach, rng)
            log_rate = self._arms[index].log_rate + 0.7 * rng.standard_normal()
            words = genome.edit()
            n = max(1, round(exp(log_rate) * self._n_searched))
            self._apply(self._arms[index], words, n, rng)
            child = Genome(words)
            self._pending[child.fingerprint] = (index, log_rate)
            children.append(child)
        return children

    def _apply(self, arm: _Arm, words: np.ndarray, n: int, rng: Generator) -> None:
        chosen = self._some_layers(rng)
        other = self._some_layers(rng, chosen[0]) if arm.move == "swap" else []
        touched = sorted({*chosen, *other})
        ranking: Orders = arm.ranking(words, touched) if callable(arm.ranking) else arm.ranking
        moved = 0
        if arm.move == "swap":
            # Either side may be the earlier one, or kept weights would only ever wander to later layers.
            sides = (chosen, other) if rng.random() < 0.5 else (other, chosen)
            moved = swap(words, self.layers, ranking, *sides, n, self.softness, rng)
        elif arm.move == "drop":
            moved = drop(words, self.layers, ranking, chosen, n, self.softness, rng)
        if not moved:
            # A grow move, or nothing could be dropped: then there is something to grow.
            moved = grow(words, self.layers, ranking, chosen, n, self.softness, rng)
        if not moved:
            drop(words, self.layers, ranking, chosen, n, self.softness, rng)

    def _some_layers(self, rng: Generator, earliest: int = 0) -> list[int]:
        """Indices of a few layers in order: one with probability 1/2, two 1/4, and so on.

        The first is drawn among all from `earliest` on, further ones among those after it, so that the first layer that
        a move may touch is as likely an early as a late one however many follow.
        """
        first = _draw(self._reach, rng, earliest)
        n = min(int(rng.geometric(0.5)), len(self.layers) - first)
        chosen = {first}
        while len(chosen) < n:
            chosen.add(_draw(self._reach, rng, first + 1))
        return sorted(chosen)

    def reward(self, genome: Genome, success: bool) -> None:
        """Tell what became of a genome: whether it joined the front. Genomes made by nobody here are ignored."""
        index, log_rate = self._pending.pop(genome.fingerprint, (None, 0.0))
        if index is None or not self.adaptive:
            return
        arm = self._arms[index]
        arm.trials = self.memory * arm.trials + 1
        arm.successes = self.memory * arm.successes + success
        # Towards what worked; after failures slowly towards smaller steps, which do less harm.
        target = arm.log_rate + 0.3 * (log_rate - arm.log_rate) if success else arm.log_rate - 0.02
        arm.log_rate = min(max(target, -log(self._n_searched)), log(0.3))
