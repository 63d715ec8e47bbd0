"""Adaptive variation: which move along which score a child gets, and how large, follows what has succeeded."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np
from numpy.random import Generator

from paretoprune.masks.genomes import Genome
from paretoprune.search.groups import MovingRanking, Ranking, SearchedGroup
from paretoprune.search.moves import Moves


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

    A move touches a group and perhaps some later ones, and costs no more than these. Everything before its first group
    stays as it was, so that an evaluator can reuse the activations up to there.

    Attributes:
        groups: The groups with searched bits, from `searched_groups`.
        rankings: One or more, to move along; some may depend on the mask that is varied.
        softness: Noise on coordinates, see `Moves`.
        first_rate: Share of all searched bits that a move changes, before anything is learnt. What the touched groups
            have to offer caps it, see `Moves`.
        floor: Smallest probability of an arm, as a share of the uniform one.
        memory: Factor by which older evidence fades with each further outcome of the same arm.
        adaptive: Whether to learn at all; otherwise arms stay equally likely and their rates where they started.

    Source:
        Probability matching: Thierens, "An adaptive pursuit strategy for allocating operator probabilities", 2005. The
        arms, the success signal and the adaptation of rates are our own.
    """

    groups: Sequence[SearchedGroup]
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
        self._n_searched = sum(group.n_searched for group in self.groups)
        # Larger groups hold more of what there is to gain, but not in proportion.
        self._reach = np.cumsum(np.sqrt([group.n_searched for group in self.groups])).tolist()

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
        chosen = self._some_groups(rng)
        other = self._some_groups(rng, chosen[0]) if arm.move == "swap" else []
        orders = arm.ranking(words, sorted({*chosen, *other})) if callable(arm.ranking) else arm.ranking
        moves = Moves(self.groups, orders, self.softness)
        moved = 0
        if arm.move == "swap":
            # Either side may be the earlier one, or kept weights would only ever wander to later groups.
            sides = (chosen, other) if rng.random() < 0.5 else (other, chosen)
            moved = moves.swap(words, *sides, n, rng)
        elif arm.move == "drop":
            moved = moves.drop(words, chosen, n, rng)
        if not moved:
            # A grow move, or nothing could be dropped: then there is something to grow.
            moved = moves.grow(words, chosen, n, rng)
        if not moved:
            moves.drop(words, chosen, n, rng)

    def _some_groups(self, rng: Generator, earliest: int = 0) -> list[int]:
        """Indices of a few groups in order: one with probability 1/2, two 1/4, and so on.

        The first is drawn among all from `earliest` on, further ones among those after it, so that the first group that
        a move may touch is as likely an early as a late one however many follow.
        """
        first = _draw(self._reach, rng, earliest)
        n = min(int(rng.geometric(0.5)), len(self.groups) - first)
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
