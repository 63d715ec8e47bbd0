"""Both phases on units that can be cut: from a trained network to a front of smaller ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from paretoprune.attention import with_plain_attention
from paretoprune.copies import copied
from paretoprune.fronts import Front, non_dominated
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.units import WeightUnits
from paretoprune.objectives import Cost
from paretoprune.search.problem import Effort, Problem, Progress
from paretoprune.search.recorder import SearchResult
from paretoprune.search.two_phase import search
from paretoprune.settings import CHANNEL_START_COSTS, Anchors, ChannelStep, Phase1, Phase2
from paretoprune.structured.allocation import (
    Prices,
    cheapest_within,
    ladder_of,
    loss_curves,
    measured_curves,
    uniform_within,
)
from paretoprune.structured.elimination import elimination_scores
from paretoprune.structured.importance import group_magnitude
from paretoprune.structured.judging import Judging, SlimJudge, SlimTask

# Share of Phase 1's children that trade channels of some groups for those of others.
LEVEL_SWITCHES = 0.5
_LOGGER = logging.getLogger("paretoprune")


@dataclass(frozen=True)
class SlimSearch(Judging):
    """How small networks are searched: how they are judged, and which are published.

    Attributes:
        front_size: Members that are finished, at most; None for all.
        sparsities: The best member beyond each of these shares of the first cost is finished, see `Front.thinned`.
        may_vanish: Whether branches may be removed as a whole.
    """

    front_size: int | None = 30
    sparsities: Sequence[float] = ()
    may_vanish: bool = True

    @classmethod
    def of(cls, step: ChannelStep, n_processes: int) -> "SlimSearch":
        """What a step of the workflow says."""
        return cls(
            step.repair,
            step.objective,
            step.repair_images,
            step.candidate_images,
            step.damping,
            n_processes,
            step.front_size,
            step.sparsities,
            step.empty_layers == "allow",
        )


def find_slim_networks(
    task: SlimTask,
    costs: Sequence[Cost],
    settings: SlimSearch,
    effort: Effort,
    *,
    phase1: Phase1 | None = None,
    anchors: Anchors | None = None,
    phase2: Phase2 | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search small networks, and finish those of the front.

    Args:
        task: What is cut, and the images.
        costs: The other objectives, one or two.
        settings: How candidates are repaired and measured.
        effort: Number of candidates, population, seed.
        phase1: Settings of Phase 1; None for the defaults.
        anchors: Settings of the anchors; None for the defaults.
        phase2: Settings of Phase 2; None for the defaults.
        progress: Called with each new history row.

    Returns:
        The front, cheapest first, with the states of its finished networks, and the history of both phases. Losses are
        measured on all images, after a repair on all calibration images.
    """
    if not settings.may_vanish:
        task = replace(task, units=task.units.keeping_branches())
    units, trained = task.units, task.network
    # Attention whose last layer is called by itself, so that its inputs can be looked at.
    task = replace(task, network=with_plain_attention(copied(trained)))
    statistics = collect_statistics(task.network, WeightUnits.of(task.network), task.calibration, seed=effort.seed)
    scores = {
        "elimination": elimination_scores(task.network, units, statistics),
        "magnitude": group_magnitude(task.network, units),
    }
    judge = SlimJudge(task, settings)
    prices = Prices(units, scores["elimination"], costs[0])
    problem = Problem(units, judge, tuple(costs), units.can_be_built, progress, settings.loss)
    found = search(
        problem,
        scores,
        effort,
        phase1=replace(phase1 or Phase1(), level_switches=LEVEL_SWITCHES),
        anchors=anchors,
        phase2=phase2,
        starts=starting_points(prices, judge),
        ladder=ladder_of(prices),
    )
    return SearchResult(_published(found.front, trained, judge, settings), found.history)


def starting_points(prices: Prices, judge: SlimJudge) -> list[np.ndarray]:
    """Allocations at several costs: uniform, by the losses of elimination, and by what each coupling loses alone.

    The two ends are among them: a search that starts far from an end rarely reaches it.

    Returns:
        Units to keep, each int64 (n_groups,); the first one keeps everything, the second one as little as possible.
    """
    units, scores = prices.units, prices.scores
    _LOGGER.info("measuring what each of %d couplings loses alone", units.n_groups)
    curves = loss_curves(units, scores), measured_curves(units, scores, judge.divergences)
    found = [units.sizes, np.array([0 if one.may_vanish else 1 for one in units.couplings], dtype=np.int64)]
    for budget in CHANNEL_START_COSTS:
        found.append(uniform_within(prices, budget))
        found += [cheapest_within(prices, curve, budget) for curve in curves]
    return list({tuple(n_keep.tolist()): n_keep for n_keep in found}.values())


def _published(front: Front, trained: nn.Module, judge: SlimJudge, settings: SlimSearch) -> Front:
    """The members that are finished, measured as they are published, without those that others now dominate."""
    front = front.thinned(settings.front_size, settings.sparsities)
    states, measured = judge.finish(front.masks)
    objectives = np.column_stack([measured.objective(settings.loss), front.costs])
    finished = Front(front.masks, objectives, front.stages, front.names, trained, states, "channels")
    return finished.select(non_dominated(finished.objectives))
