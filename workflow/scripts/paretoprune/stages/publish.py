"""Publishing: from the front of a search to finished networks, measured as they are published."""

import numpy as np

from paretoprune.evaluation.finishing import Finisher
from paretoprune.fronts import Front, non_dominated
from paretoprune.settings import Publishing
from paretoprune.stages.candidates import Setup


def publish(front: Front, setup: Setup, publishing: Publishing) -> Front:
    """Thin a front, finish its networks, measure them, and drop those that others now dominate.

    Networks are measured on all search images in float32, see `docs/method.md`, section 6.

    Args:
        front: The front of a search.
        setup: What is pruned, and how networks are repaired and measured.
        publishing: Which members stay.

    Returns:
        The front with its finished networks; members whose weights were chosen anew have the stage `reselected`.

    Raises:
        ValueError: The front is empty: every evaluated network has an empty layer, which is forbidden.
    """
    if not len(front):
        raise ValueError(
            "expected at least one network to publish, found none: each that was tried has a layer that keeps nothing; "
            "set `empty_layers: allow`, or raise `evaluations` or, for an allocation, `densities.highest`"
        )
    front = front.thinned(publishing.front_size, publishing.sparsities)
    # If the repair re-fits weights, each network is finished twice, with the weights found and with weights chosen
    # anew, and the better one stays. The best of many candidates are partly luck on the images of the search; weights
    # chosen anew owe nothing to these images.
    masks, states, measured = Finisher(setup.task, setup.searching, setup.compute).finish(front.masks, reselect=True)
    objectives = np.column_stack([measured.objective(setup.searching.objective), front.costs])
    unchanged = np.all(masks.words == front.masks.words, axis=1)
    stages = [stage if same else "reselected" for stage, same in zip(front.stages, unchanged, strict=True)]
    finished = Front(masks, objectives, stages, front.names, setup.task.network, states)
    return finished.select(non_dominated(finished.objectives))
