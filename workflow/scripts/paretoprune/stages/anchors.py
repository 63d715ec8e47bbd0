"""Anchors: the members of Phase 1's front that the corridors of Phase 2 lie between."""

from paretoprune.fronts import Front
from paretoprune.search.corridor import anchors_between, choose_anchors
from paretoprune.settings import Anchors


def find_anchors(front: Front, dense_loss: float, n_classes: int, settings: Anchors) -> list[int]:
    """Members of Phase 1's front, from the light to the heavy anchor; one, where the front has no more.

    Args:
        front: Of Phase 1.
        dense_loss: Of the dense network: its error on the search images, 0 where the divergence is minimised.
        n_classes: Guessing among them is wrong in all but one of as many cases.
        settings: Tolerances, and the number of corridors.

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
    # Without a corridor all masks are searched; the two anchors are still worth knowing.
    return anchors_between(front, light, heavy, max(1, settings.corridors))
