"""What several workflow steps read the same way."""

from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import LabelledImages, Splits
from paretoprune.networks.checkpoints import DenseNetwork


def read_splits(images: str, splits: str, dense: DenseNetwork, *names: str) -> list[LabelledImages]:
    """Read some of the splits, normalised as the dense network expects."""
    image_set, indices = ImageSet.load(images), Splits.load(splits)
    return [LabelledImages.of(image_set, getattr(indices, name), dense.mean, dense.std) for name in names]
