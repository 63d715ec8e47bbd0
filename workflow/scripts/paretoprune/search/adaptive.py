"""Adaptive variation: the choice of a move, and its size, follow what has succeeded before."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np
from numpy.random import Generator

from paretoprune.masks.genomes import Genome
from paretoprune.search.groups import CandidateRanking, Ranking, SearchedGroup
from paretoprune.search.moves import Moves

MOVES = ("drop", "grow", "swap")


def _draw_index(cumulative: Sequence[float], rng: Generator, first: int = 0) -> int:
    """Draw an index from `first` on, with the weights whose cumulative sum is given."""
    before = cumulative[first - 1] if first else 0.0
    drawn = before + rng.random() * (cumulative[-1] - before)
    # Rounding may carry the number past either end.
    return min(max(bisect_right(cumulative, drawn), first), len(cumulative) - 1)


@dataclass
class _Arm:
    """One kind of move along one ranking, with its recent successes and trials, and the mean logarithm of its rate."""

    move: str
    ranking: Ranking | CandidateRanking
    log_rate: float
    successes: float = 0.0
    trials: float = 0.0


@dataclass
class AdaptiveVariation:
    """Drop, grow and swap moves along importance, whose choice and size follow their success.

    An *arm* is one move along one ranking. It is drawn with a probability proportional to its recent share of
    successes, Laplace-smoothed and never below `floor`. The *rate* is the share of bits that it moves. It is drawn
    log-normally around a mean that is pulled towards the rates that succeeded. Algorithms report success by genome
    through `reward`, so that any algorithm can use the operator unmodified.

    A move changes one group and perhaps some later ones. Everything before its first group stays as it was, so that an
    evaluator can reuse the activations up to there.

    Attributes:
        groups: The groups with searched bits.
        rankings: One or more, to move along; some may depend on the mask that is varied.
        softness: Standard deviation of the noise on coordinates, see `Moves`.
        first_rate: Share of all searched bits that a move changes before anything is learnt; at most half of what its
            groups offer, see `Moves`.
        floor: Smallest probability of an arm, as a share of the uniform probability.
        memory: Factor by which the weight of an arm's older outcomes falls with each further one.
        adaptive: Whether to learn; if not, arms stay equally likely and keep their first rates.

    Source:
        Probability matching: Thierens, "An adaptive pursuit strategy for allocating operator probabilities", 2005. The
        arms, the success signal and the adaptation of rates are our own.
    """

    groups: Sequence[SearchedGroup]
    rankings: Sequence[Ranking | CandidateRanking]
    softness: float = 0.05
    first_rate: float = 0.02
    floor: float = 0.2
    memory: float = 0.95
    adaptive: bool = True
    _pending: dict[bytes, tuple[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        first_log_rate = log(self.first_rate)
        self._arms = [_Arm(move, ranking, first_log_rate) for ranking in self.rankings for move in MOVES]
        self._n_searched = sum(group.n_searched for group in self.groups)
        # A larger group offers more to gain, but less than in proportion to its size.
        self._cumulative_weights = np.cumsum(np.sqrt([group.n_searched for group in self.groups])).tolist()

    def probabilities(self) -> np.ndarray:
        """Probability of each arm, float (n_arms,)."""
        quality = np.array([(arm.successes + 1) / (arm.trials + 2) for arm in self._arms])
        return self.floor / len(quality) + (1 - self.floor) * quality / quality.sum()

    def vary(self, genomes: Sequence[Genome], rng: Generator) -> list[Genome]:
        """Apply one move to each genome, which changes at least one bit.

        Args:
            genomes: To vary; drafts among them are changed in place.
            rng: Random generator.

        Returns:
            One new genome for each.
        """
        cumulative = np.cumsum(self.probabilities()).tolist()
        children = []
        for genome in genomes:
            index = _draw_index(cumulative, rng)
            log_rate = self._arms[index].log_rate + 0.7 * rng.standard_normal()
            words = genome.edit()
            n = max(1, round(exp(log_rate) * self._n_searched))
            self._apply(self._arms[index], words, n, rng)
            child = Genome(words)
            self._pending[child.fingerprint] = (index, log_rate)
            children.append(child)
        return children

    def _apply(self, arm: _Arm, words: np.ndarray, n: int, rng: Generator) -> None:
        """Make an arm's move of at most `n` bits, or another one where it is not possible, in place."""
        chosen = self._draw_groups(rng)
        other = self._draw_groups(rng, chosen[0]) if arm.move == "swap" else []
        orders = arm.ranking(words, sorted({*chosen, *other})) if callable(arm.ranking) else arm.ranking
        moves = Moves(self.groups, orders, self.softness)
        moved = 0
        if arm.move == "swap":
            # `other` never begins before `chosen`. If bits were always dropped in the one and grown in the other, kept
            # weights would only ever move to later groups.
            sides = (chosen, other) if rng.random() < 0.5 else (other, chosen)
            moved = moves.swap(words, *sides, n, rng)
        elif arm.move == "drop":
            moved = moves.drop(words, chosen, n, rng)
        if not moved:
            # A grow move; or a drop or swap found no ones to drop, and then there are zeros to grow.
            moved = moves.grow(words, chosen, n, rng)
        if not moved:
            # A grow move found no zeros: then there are ones to drop.
            moves.drop(words, chosen, n, rng)

    def _draw_groups(self, rng: Generator, earliest: int = 0) -> list[int]:
        """Draw a few groups: one with probability 1/2, two with probability 1/4, and so on; indices in order."""
        # The first group decides how many activations can be reused. It is drawn by itself, and further ones after it:
        # the earliest of several groups that are drawn alike would mostly be near the network's input.
        first = _draw_index(self._cumulative_weights, rng, earliest)
        n = min(int(rng.geometric(0.5)), len(self.groups) - first)
        chosen = {first}
        while len(chosen) < n:
            chosen.add(_draw_index(self._cumulative_weights, rng, first + 1))
        return sorted(chosen)

    def reward(self, genome: Genome, success: bool) -> None:
        """Learn whether a genome joined the front; genomes that were made elsewhere are ignored."""
        index, log_rate = self._pending.pop(genome.fingerprint, (None, 0.0))
        if index is None or not self.adaptive:
            return
        arm = self._arms[index]
        arm.trials = self.memory * arm.trials + 1
        arm.successes = self.memory * arm.successes + success
        # Success pulls the rate towards the one that worked; failure lowers it slowly, as smaller moves do less harm.
        target = arm.log_rate + 0.3 * (log_rate - arm.log_rate) if success else arm.log_rate - 0.02
        arm.log_rate = min(max(target, -log(self._n_searched)), log(0.3))
