"""Anchors: the members of Phase 1's front between which the corridors of Phase 2 lie."""

from paretoprune.fronts import Front
from paretoprune.search.corridor import anchors_between, choose_anchors
from paretoprune.settings import Anchors


def find_anchors(front: Front, dense_loss: float, n_classes: int, settings: Anchors) -> list[int]:
    """Choose the anchors among the members of Phase 1's front.

    Args:
        front: Phase 1's front.
        dense_loss: The loss of the dense network: its error on the search images, or 0 if the loss is the divergence.
        n_classes: Number of classes; guessing has the error 1 - 1/n_classes.
        settings: Tolerances and the number of corridors.

    Returns:
        Indices from the light to the heavy anchor; a single one if the front has one member.

    Raises:
        ValueError: The front is empty.
    """
    light, heavy = choose_anchors(
        front,
        dense_loss,
        1 - 1 / n_classes,
        light_tolerance=settings.light_tolerance,
        heavy_tolerance=settings.heavy_tolerance,
    )
    # With 0 corridors all masks are searched, but the report shows the two anchors nevertheless.
    return anchors_between(front, light, heavy, max(1, settings.corridors))
