"""Publishing: from what a search has found to finished networks that are measured as they are shipped."""

import numpy as np

from paretoprune.evaluation.finishing import Finisher
from paretoprune.fronts import Front, non_dominated
from paretoprune.settings import Publishing
from paretoprune.stages.candidates import Setup


def publish(front: Front, setup: Setup, publishing: Publishing) -> Front:
    """Thin a front, finish its networks, and measure them.

    `front_size` members stay, among them the best ones beyond each of `sparsities`.

    What is published is evaluated once more: on all search images, in float32, with the repair of the method. Where it
    re-fits weights, each network is re-fitted layer by layer, once with the weights that were found and once with each
    layer's chosen anew. Of the two the better stays: a search has seen so many candidates on its images that the best
    of them are partly luck, and weights chosen anew have not seen them. Members that others then dominate are dropped.

    Args:
        front: What a search has found.
        setup: What is pruned, and how networks are put right and measured.
        publishing: Which members stay.

    Returns:
        The front with its finished networks; members whose weights were chosen anew are of stage `reselected`.

    Raises:
        ValueError: The front is empty: every network that was tried has an empty layer, which is forbidden.
    """
    if not len(front):
        raise ValueError(
            "expected at least one network to publish, found none: each that was tried has a layer that keeps nothing; "
            "set `empty_layers: allow`, or raise `evaluations` or, for an allocation, `densities.highest`"
        )
    front = front.thinned(publishing.front_size, publishing.sparsities)
    masks, states, scores = Finisher(setup.task, setup.searching, setup.compute).finish(front.masks, reselect=True)
    objectives = np.column_stack([scores.objective(setup.searching.objective), front.costs])
    same = np.all(masks.words == front.masks.words, axis=1)
    stages = [stage if kept else "reselected" for stage, kept in zip(front.stages, same, strict=True)]
    evaluated = Front(masks, objectives, stages, front.names, setup.task.network, states)
    return evaluated.select(non_dominated(evaluated.objectives))
