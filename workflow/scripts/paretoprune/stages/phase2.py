"""Phase 2: a bit per corridor weight, from the front of Phase 1 on."""

from collections.abc import Mapping

import numpy as np

from paretoprune.masks.packed import PackedMasks
from paretoprune.search.corridor import Corridor, corridors_of
from paretoprune.search.guidance import CandidateGuide
from paretoprune.search.phase2 import Guide, search_corridor
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult
from paretoprune.settings import Phase2
from paretoprune.stages.candidates import Setup


def refine_bits(
    setup: Setup,
    scores: Mapping[str, np.ndarray],
    anchors: PackedMasks | None,
    before: SearchResult,
    settings: Phase2,
    effort: Effort,
) -> SearchResult:
    """Search the corridors, and merge what is found with Phase 1's front.

    Args:
        setup: What is pruned, and how candidates are evaluated.
        scores: Those among the guides, each float32 (n_weights,), in their order.
        anchors: From light to heavy; None to search all masks.
        before: Phase 1.
        settings: Of Phase 2; the guide `refit` asks for the costs of each candidate as re-fitted.
        effort: Evaluations of this phase, population and seed.
    """
    units = setup.task.units
    corridors = [Corridor.everything(units)] if anchors is None else corridors_of(anchors, units)
    guides: list[Guide] = list(scores.values())
    with setup.evaluator() as evaluate:
        if settings.follows_refits:
            costs = evaluate.refit_costs()
            guides.append(lambda corridor: CandidateGuide(costs, units, corridor.groups))
        return search_corridor(setup.problem(evaluate), corridors, guides, before, settings, effort)
