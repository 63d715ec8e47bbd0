"""Sampling and variation of packed genomes: functions on arrays that take a random generator.

A genome is a row of uint64 words (n_words,), see `paretoprune.masks.pack_rows`. A *coordinate* is a float per bit in
(0, 1) that rises with the importance of the weight inside its layer, see `Corridor.coordinates`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from paretoprune.masks import WORD_BITS, fingerprint, n_words_for, pack_rows, unpack_row


def keep_probabilities(coordinate: np.ndarray, density: float, softness: float) -> np.ndarray:
    """Probability of each bit to be 1: a logistic step along the coordinate, placed so that the mean is `density`.

    Args:
        coordinate: float (n_bits,) in (0, 1).
        density: Expected share of ones, 0 to 1.
        softness: Width of the step; near 0 the best coordinates are kept for sure, large values ignore the coordinate.

    Returns:
        float (n_bits,).
    """

    def probabilities(centre: float) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(np.clip((centre - coordinate) / softness, -50, 50)))

    # The mean falls as the centre rises. The far ends give densities of almost exactly 1 and 0.
    low, high = -50 * softness, 1 + 50 * softness
    for _ in range(40):
        centre = (low + high) / 2
        low, high = (centre, high) if probabilities(centre).mean() > density else (low, centre)
    return probabilities((low + high) / 2)


def sample_bernoulli(coordinate: np.ndarray, densities: Sequence[float], softness: float, rng: Generator) -> np.ndarray:
    """Draw one genome per density, each bit by its own probability, which rises with importance.

    Returns:
        uint64 (n, n_words).
    """
    rows = [rng.random(len(coordinate)) < keep_probabilities(coordinate, d, softness) for d in densities]
    return pack_rows(np.array(rows, dtype=bool).reshape(len(densities), len(coordinate)))


def sample_blind(n_bits: int, densities: Sequence[float], rng: Generator) -> np.ndarray:
    """Draw one genome per density, all bits alike; uint64 (n, n_words)."""
    return pack_rows(np.array([rng.random(n_bits) < d for d in densities], dtype=bool).reshape(len(densities), n_bits))


def layer_words(layer_offsets: np.ndarray) -> np.ndarray:
    """The bits of each layer as words; uint64 (n_layers, n_words)."""
    n_bits = int(layer_offsets[-1])
    words = np.zeros((len(layer_offsets) - 1, n_words_for(n_bits)), dtype=np.uint64)
    for row, (start, stop) in zip(words, pairwise(layer_offsets), strict=True):
        first, last = start // WORD_BITS, n_words_for(stop)
        within = np.zeros((last - first) * WORD_BITS, dtype=bool)
        within[start - first * WORD_BITS : stop - first * WORD_BITS] = True
        row[first:last] = pack_rows(within[None])[0]
    return words


def exchange(first: np.ndarray, second: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`first` with the bits in `where` taken from `second`; all uint64, shapes broadcast."""
    return first ^ ((first ^ second) & where)


def layer_crossover(first: np.ndarray, second: np.ndarray, layers: np.ndarray, rng: Generator) -> np.ndarray:
    """Each layer as a whole from either parent, so that what was tuned inside a layer stays together.

    Args:
        first: uint64 (n, n_words), one parent a row.
        second: uint64 (n, n_words), the other.
        layers: uint64 (n_layers, n_words) from `layer_words`.
        rng: Random generator.

    Returns:
        uint64 (n, n_words), one child a pair.
    """
    chosen = rng.random((len(first), len(layers))) < 0.5
    where = np.stack([np.bitwise_or.reduce(layers[row], axis=0) for row in chosen])
    return exchange(first, second, where)


def uniform_crossover(first: np.ndarray, second: np.ndarray, rng: Generator) -> np.ndarray:
    """Each bit from either parent, uint64 (n, n_words)."""
    return exchange(first, second, rng.integers(0, 2**64, size=first.shape, dtype=np.uint64))


def flip_bits(words: np.ndarray, n_bits: int, rate: float, rng: Generator) -> np.ndarray:
    """Flip each bit with probability `rate`, at least one a genome.

    Args:
        words: uint64 (n, n_words).
        n_bits: Bits in use.
        rate: Probability, 0 to 1.
        rng: Random generator.

    Returns:
        uint64 (n, n_words), changed copies.
    """
    flipped = words.copy()
    for row in flipped:
        n_flips = max(1, int(rng.binomial(n_bits, rate)))
        at = rng.choice(n_bits, size=n_flips, replace=False, shuffle=False)
        np.bitwise_xor.at(row, at // WORD_BITS, np.uint64(1) << (at % WORD_BITS).astype(np.uint64))
    return flipped


def _lowest(keys: np.ndarray, n: int) -> np.ndarray:
    """Positions of the `n` lowest keys, in no order."""
    return np.argpartition(keys, n - 1)[:n] if n < len(keys) else np.arange(len(keys))


def drop(bits: np.ndarray, coordinate: np.ndarray, where: np.ndarray, n: int, softness: float, rng: Generator) -> int:
    """Clear up to `n` ones that matter least, in place.

    Args:
        bits: bool (n_bits,), changed in place.
        coordinate: float (n_bits,), importance of each bit in its layer.
        where: int (n_where,), the bits that may change.
        n: How many.
        softness: Scale of the noise on the coordinates, so that repeated drops differ.
        rng: Random generator.

    Returns:
        How many were cleared; fewer than `n` when there were not as many ones.
    """
    return _move(bits, coordinate, where, n, softness, rng, value=True)


def grow(bits: np.ndarray, coordinate: np.ndarray, where: np.ndarray, n: int, softness: float, rng: Generator) -> int:
    """Set up to `n` zeros that matter most, in place; arguments and result as for `drop`."""
    return _move(bits, -coordinate, where, n, softness, rng, value=False)


def _move(
    bits: np.ndarray, key: np.ndarray, where: np.ndarray, n: int, softness: float, rng: Generator, *, value: bool
) -> int:
    candidates = where[bits[where] == value]
    if not len(candidates) or n < 1:
        return 0
    noisy = key[candidates] + softness * rng.standard_normal(len(candidates), dtype=np.float32)
    chosen = candidates[_lowest(noisy, n)]
    bits[chosen] = not value
    return len(chosen)


def swap(
    bits: np.ndarray,
    coordinate: np.ndarray,
    drop_where: np.ndarray,
    grow_where: np.ndarray,
    n: int,
    softness: float,
    rng: Generator,
) -> int:
    """Clear up to `n` ones in `drop_where` and set as many zeros in `grow_where`, in place: the density stays.

    Returns:
        How many pairs were swapped.
    """
    n = min(n, int(bits[drop_where].sum()), int((~bits[grow_where]).sum()))
    before = bits.copy()
    # Grow first: what drop clears must not be set again in the same move.
    grown = grow(bits, coordinate, grow_where, n, softness, rng)
    was_one = drop_where[before[drop_where]]
    return drop(bits, coordinate, was_one, grown, softness, rng)


MOVES = ("drop", "grow", "swap")


@dataclass
class _Arm:
    """One kind of move along one importance score, with what is known of its success."""

    move: str
    coordinate: np.ndarray
    log_rate: float
    successes: float = 0.0
    trials: float = 0.0


@dataclass
class AdaptiveVariation:
    """Drop, grow and swap moves along importance, whose choice and size follow their success.

    An *arm* is one move along one coordinate. An arm is drawn with probability proportional to its recent share of
    successes (Laplace-smoothed, never below `floor`); the share of bits that it moves is drawn log-normally around a
    rate that is pulled towards the rates that succeeded. Success is told afterwards, by genome, through `reward`, so
    that any algorithm can use the operator unmodified.

    Attributes:
        coordinates: One or more float (n_bits,), the importance scores to move along.
        layer_offsets: int (n_layers + 1,), where each layer starts in a genome.
        softness: Noise on coordinates.
        first_rate: Share of all bits that a move changes, before anything is learnt.
        floor: Smallest probability of an arm, as a share of the uniform one.
        memory: Factor by which older evidence fades with each further outcome of the same arm.

    Source:
        Probability matching: Thierens, "An adaptive pursuit strategy for allocating operator probabilities", 2005. The
        arms, the success signal and the adaptation of rates are our own.
    """

    coordinates: Sequence[np.ndarray]
    layer_offsets: np.ndarray
    softness: float = 0.05
    first_rate: float = 0.02
    floor: float = 0.2
    memory: float = 0.95
    _pending: dict[bytes, tuple[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._arms = [
            _Arm(move, coordinate, float(np.log(self.first_rate))) for coordinate in self.coordinates for move in MOVES
        ]

    @property
    def n_bits(self) -> int:
        """Bits of a genome."""
        return int(self.layer_offsets[-1])

    def probabilities(self) -> np.ndarray:
        """Probability of each arm, float (n_arms,)."""
        quality = np.array([(arm.successes + 1) / (arm.trials + 2) for arm in self._arms])
        return self.floor / len(quality) + (1 - self.floor) * quality / quality.sum()

    def vary(self, words: np.ndarray, rng: Generator) -> np.ndarray:
        """Apply one move to each genome.

        Args:
            words: uint64 (n, n_words).
            rng: Random generator.

        Returns:
            uint64 (n, n_words), changed copies.
        """
        probabilities = self.probabilities()
        changed = np.empty_like(words)
        for i, row in enumerate(words):
            index = int(rng.choice(len(self._arms), p=probabilities))
            log_rate = self._arms[index].log_rate + 0.7 * rng.standard_normal()
            bits = unpack_row(row, self.n_bits)
            n_moves = int(np.clip(round(np.exp(log_rate) * self.n_bits), 1, self.n_bits))
            self._apply(self._arms[index], bits, n_moves, rng)
            changed[i] = pack_rows(bits[None])[0]
            self._pending[fingerprint(changed[i])] = (index, log_rate)
        return changed

    def _apply(self, arm: _Arm, bits: np.ndarray, n: int, rng: Generator) -> None:
        moves: dict[str, Callable[[], int]] = {
            "drop": lambda: drop(bits, arm.coordinate, self._some_layers(rng), n, self.softness, rng),
            "grow": lambda: grow(bits, arm.coordinate, self._some_layers(rng), n, self.softness, rng),
            "swap": lambda: swap(
                bits, arm.coordinate, self._some_layers(rng), self._some_layers(rng), n, self.softness, rng
            ),
        }
        if not moves[arm.move]():
            # The chosen layers had nothing to move; anywhere else there is at least one bit to drop or to grow.
            everywhere = np.arange(self.n_bits)
            (grow if not bits.any() else drop)(bits, arm.coordinate, everywhere, n, self.softness, rng)

    def _some_layers(self, rng: Generator) -> np.ndarray:
        """Genome positions of a few layers: one with probability 1/2, two 1/4, and so on."""
        sizes = np.diff(self.layer_offsets)
        usable = np.flatnonzero(sizes)
        n = min(int(rng.geometric(0.5)), len(usable))
        # Larger layers hold more of what there is to gain, but not in proportion.
        weight = np.sqrt(sizes[usable])
        chosen = rng.choice(usable, size=n, replace=False, p=weight / weight.sum())
        return np.concatenate([np.arange(self.layer_offsets[k], self.layer_offsets[k + 1]) for k in np.sort(chosen)])

    def reward(self, genome: np.ndarray, success: bool) -> None:
        """Tell what became of a genome: whether it joined the front. Genomes made by nobody here are ignored."""
        index, log_rate = self._pending.pop(fingerprint(genome), (None, 0.0))
        if index is None:
            return
        arm = self._arms[index]
        arm.trials = self.memory * arm.trials + 1
        arm.successes = self.memory * arm.successes + success
        # Towards what worked; after failures slowly towards smaller steps, which do less harm.
        target = arm.log_rate + 0.3 * (log_rate - arm.log_rate) if success else arm.log_rate - 0.02
        arm.log_rate = float(np.clip(target, -np.log(self.n_bits), np.log(0.3)))
