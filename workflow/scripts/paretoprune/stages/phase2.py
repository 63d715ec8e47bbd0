"""Phase 2: one bit per weight of the corridors, searched from the front of Phase 1 on."""

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
    previous: SearchResult,
    settings: Phase2,
    effort: Effort,
) -> SearchResult:
    """Search the corridors, and merge the result with Phase 1's front.

    Args:
        setup: What is pruned, and how candidates are evaluated.
        scores: The scores among the guides by name, each float32 (n_weights,), in the order of the guides.
        anchors: Masks from the light to the heavy anchor; None to search all masks.
        previous: The result of Phase 1.
        settings: The settings of Phase 2. With the guide `refit`, moves also follow what a drop costs and a grow gains
            in each candidate after a re-fit.
        effort: Evaluations of this phase, population and seed.
    """
    units = setup.task.units
    corridors = [Corridor.everything(units)] if anchors is None else corridors_of(anchors, units)
    guides: list[Guide] = list(scores.values())
    with setup.evaluator() as evaluator:
        if settings.follows_refits:
            flip_costs = evaluator.refit_costs()
            guides.append(lambda corridor: CandidateGuide(flip_costs, units, corridor.groups))
        return search_corridor(setup.problem(evaluator), corridors, guides, previous, settings, effort)
