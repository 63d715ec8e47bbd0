"""Which channels each tool keeps at each level of removed multiply-adds, as masks over the same units."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups
from paretoprune.structured.allocation import Prices, cheapest_within, loss_curves, measured_curves, uniform_within
from paretoprune.structured.elimination import elimination_scores
from paretoprune.structured.importance import group_magnitude
from paretoprune.structured.judging import Judging, SlimJudge

from benchmarks.channels.peers import IMPORTANCES, Pruner, check_same_answers, layers_that_stay, mask_of, nearest_ratio
from benchmarks.channels.subject import SEED, Subject, experiment

TORCH_PRUNING, UNIFORM, OURS = "torch-pruning", "uniform", "paretoprune"
N_COMPARED_IMAGES = 64
# Spreads of the random shares that layers keep, as standard deviations of their logits.
SPREADS = (0.2, 1.5)
_LOGGER = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Choice:
    """Channels that a tool keeps.

    Attributes:
        tool: Whose choice it is.
        importance: What says which channels of a layer go first.
        allocation: What says how many each layer keeps.
        level: Share of the multiply-adds that was to be removed.
        bits: bool (n_units,), True = kept.
        ratio: The tool's own setting that removes as much; None where it has none.
        tried: Candidates that it was chosen from.
    """

    tool: str
    importance: str
    allocation: str
    level: float
    bits: np.ndarray
    ratio: float | None = None
    tried: int = 1


def peers(subject: Subject, levels: Sequence[float]) -> Iterator[Choice]:
    """What torch-pruning chooses by each importance, local and global.

    Raises:
        ValueError: A mask of ours gives another network than the tool's.
    """
    images = subject.search.images[:N_COMPARED_IMAGES]
    for importance in IMPORTANCES:
        for globally in (False, True):
            prune = pruner(subject, importance, globally=globally)
            known: dict[float, np.ndarray] = {}

            def mask_at(ratio: float, prune: Pruner = prune, known: dict[float, np.ndarray] = known) -> np.ndarray:
                if ratio not in known:
                    known[ratio] = mask_of(subject.units, prune(ratio).cuts)
                return known[ratio]

            def removed(ratio: float, mask_at: Callable[[float], np.ndarray] = mask_at) -> float:
                return subject.removed(mask_at(ratio))

            for level in levels:
                ratio = nearest_ratio(removed, level)
                bits = mask_at(ratio)
                check_same_answers(prune(ratio).network, subject.units.slim(subject.network, bits), images)
                yield Choice(TORCH_PRUNING, importance, "global" if globally else "local", level, bits, ratio)


def pruner(subject: Subject, importance: str, *, globally: bool) -> Pruner:
    """torch-pruning's pruner for a subject, told to leave alone what is no unit."""
    ignored = layers_that_stay(subject.network, subject.units)
    image = subject.search.images[:1]
    gradients = subject.gradients if IMPORTANCES[importance].needs_gradients else None
    return Pruner(subject.network, image, importance, globally=globally, ignored=ignored, gradients=gradients)


def our_order(subject: Subject) -> Prices:
    """What allocations cost whose layers keep the channels that our elimination removes last."""
    layout = WeightUnits.of(subject.network)
    statistics = collect_statistics(subject.network, layout, subject.calibration.images, seed=SEED)
    return Prices(subject.units, elimination_scores(subject.network, subject.units, statistics), subject.macs)


def uniform(subject: Subject, order: Prices, levels: Sequence[float]) -> Iterator[Choice]:
    """The same share of every layer, by magnitude and by our order."""
    magnitude = Prices(subject.units, group_magnitude(subject.network, subject.units), subject.macs)
    for name, prices in (("magnitude", magnitude), ("elimination", order)):
        for level in levels:
            yield Choice(UNIFORM, name, "local", level, prices.mask(uniform_within(prices, 1 - level)))


def least_loss(subject: Subject, order: Prices, levels: Sequence[float]) -> Iterator[Choice]:
    """The allocation of least loss by our order, one of the starts of our search."""
    yield from _cheapest(order, loss_curves(subject.units, order.scores), "least loss", levels)


def least_measured_loss(subject: Subject, order: Prices, levels: Sequence[float]) -> Iterator[Choice]:
    """The allocation of least loss as it is measured of each layer alone, another start; it takes a while."""
    judge = SlimJudge(subject.task, Judging("reconstruct", n_images=experiment()["search"]["candidate_images"]))
    yield from _cheapest(
        order, measured_curves(subject.units, order.scores, judge.divergences), "least measured loss", levels
    )


def _cheapest(
    order: Prices, curves: Sequence[np.ndarray], allocation: str, levels: Sequence[float]
) -> Iterator[Choice]:
    for level in levels:
        bits = order.mask(cheapest_within(order, curves, 1 - level))
        yield Choice(f"{OURS}, one shot", "elimination", allocation, level, bits)


def searched(
    subject: Subject, known: Sequence[Choice], n_candidates: int, judging: Judging, *, seed: int = SEED
) -> Iterator[Choice]:
    """The best of several allocations of each of torch-pruning's importances: a budget as a search has it.

    Args:
        subject: What is pruned.
        known: What torch-pruning chooses by itself; its local and global choice are among the candidates.
        n_candidates: For each importance and level.
        judging: How candidates are repaired and measured on the search images, as those of our search are.
        seed: Fixes the random allocations.

    Yields:
        The best of each importance and level.
    """
    judge, units = SlimJudge(subject.task, judging), subject.units
    own = [choice for choice in known if choice.tool == TORCH_PRUNING]
    for importance in dict.fromkeys(choice.importance for choice in own):
        ranks = ranks_within_groups(pruner(subject, importance, globally=False).scores(units), units)
        rng = np.random.default_rng(seed)
        for level in dict.fromkeys(choice.level for choice in own):
            first = [choice for choice in own if (choice.importance, choice.level) == (importance, level)]
            rows = [choice.bits for choice in first]
            while len(rows) < n_candidates:
                rows.append(keep_top(ranks, random_counts(subject, ranks, level, rng), units))
            losses = judge(PackedMasks.pack_each(rows, units.n_units))
            best = int(np.argmin(losses))
            _LOGGER.info(
                "%s, %.0f %%: the best of %d has a loss of %.4f, the tool's own %s",
                *(importance, 100 * level, len(rows), losses[best]),
                " and ".join(f"{loss:.4f}" for loss in losses[: len(first)]),
            )
            yield replace(first[0], allocation="searched", bits=rows[best], ratio=None, tried=len(rows))


def random_counts(subject: Subject, ranks: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Random shares of the layers that together remove a level of the multiply-adds, or as little more as can be.

    Returns:
        Units to keep, int64 (n_groups,).
    """
    sizes = subject.units.sizes
    logits = rng.normal(0.0, rng.uniform(*SPREADS), len(sizes))

    def at(offset: float) -> np.ndarray:
        shares = 1 / (1 + np.exp(-(logits + offset)))
        return np.clip(np.rint(shares * sizes), 1, sizes).astype(np.int64)

    low, high = -12.0, 12.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = subject.removed(keep_top(ranks, at(middle), subject.units)) >= level
        low, high = (middle, high) if fits else (low, middle)
    return at(low)
