"""Phase 2: a bit per corridor weight, from the front of Phase 1 on."""

from collections.abc import Mapping

import numpy as np

from paretoprune.evaluation.task import Task
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.corridor import Corridor, corridors_of
from paretoprune.search.guidance import CandidateGuide
from paretoprune.search.phase2 import Guide, search_corridor
from paretoprune.search.problem import Effort, Progress
from paretoprune.search.recorder import SearchResult
from paretoprune.settings import REFIT_GUIDE, Compute, Phase2, Searching
from paretoprune.stages.candidates import candidate_evaluator, make_problem


def refine_bits(
    task: Task,
    scores: Mapping[str, np.ndarray],
    anchors: PackedMasks | None,
    before: SearchResult,
    searching: Searching,
    settings: Phase2,
    effort: Effort,
    compute: Compute,
    *,
    progress: Progress | None = None,
) -> SearchResult:
    """Search the corridors, and merge what is found with Phase 1's front.

    Args:
        task: What is pruned.
        scores: Those among the guides, each float32 (n_weights,), in their order.
        anchors: From light to heavy; None to search all masks.
        before: Phase 1.
        searching: How candidates are judged.
        settings: Of Phase 2; the guide `refit` asks for the costs of each candidate as re-fitted.
        effort: Evaluations of this phase, population and seed.
        compute: What to compute with.
        progress: Called with each new history row.
    """
    corridors = [Corridor.everything(task.units)] if anchors is None else corridors_of(anchors, task.units)
    guides: list[Guide] = list(scores.values())
    with candidate_evaluator(task, searching, compute) as evaluate:
        if REFIT_GUIDE in settings.guides:
            costs = evaluate.refit_costs()
            guides.append(lambda corridor: CandidateGuide(costs, task.units, corridor.groups))
        problem = make_problem(task, evaluate, searching, progress)
        return search_corridor(problem, corridors, guides, before, settings, effort)
