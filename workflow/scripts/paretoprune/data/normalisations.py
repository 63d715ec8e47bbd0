"""Normalisations by name, for checkpoints that were trained with one that many share."""

from collections.abc import Mapping, Sequence

# Mean and standard deviation of each channel of images in [0, 1].
#
# Source:
#     imagenet: torchvision's documentation of its weights, "Models and pre-trained weights".
#     cifar10, cifar100: over all pixels of the 50,000 training images of Krizhevsky, "Learning multiple layers of
#     features from tiny images", 2009, to four digits. Some checkpoints of CIFAR-10 were trained with the deviations
#     0.2023, 0.1994, 0.2010, which are means over the images' own; they need their numbers given.
NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def normalisation_of(
    wanted: str | Mapping[str, Sequence[float]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by name, or as they are given.

    Raises:
        ValueError: No such name.
    """
    if not isinstance(wanted, str):
        return tuple(wanted["mean"]), tuple(wanted["std"])
    if wanted not in NORMALISATIONS:
        raise ValueError(
            f"expected a normalisation among {', '.join(NORMALISATIONS)} or `mean` and `std`, found '{wanted}'"
        )
    return NORMALISATIONS[wanted]
