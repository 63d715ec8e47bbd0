"""Labelled examples in memory, and the file that keeps them: what every step reads."""

import json
import os
from dataclasses import dataclass

from safetensors import safe_open
from torch import Tensor

from paretoprune.tensors import save_tensors


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, signals or rows of a table in memory.

    Attributes:
        images: uint8 (n, channels, height, width), 0 to 255, which stand for 0 to 1; or float32, values as they are:
            images (n, channels, height, width), signals (n, channels, length) or tables (n, features).
        labels: int64 (n,), class indices.
        is_test: bool (n,), True for the source's own test images.
        classes: Class names, by index.
    """

    images: Tensor
    labels: Tensor
    is_test: Tensor
    classes: tuple[str, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file."""
        tensors = {"images": self.images, "labels": self.labels, "is_test": self.is_test}
        save_tensors(path, tensors, {"classes": json.dumps(self.classes)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ImageSet":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as handle:
            classes = tuple(json.loads(handle.metadata()["classes"]))
            images, labels, is_test = (handle.get_tensor(name) for name in ("images", "labels", "is_test"))
        return cls(images, labels, is_test, classes)


def check_augmentation(images: Tensor, crop: int, flip: bool) -> None:
    """Refuse an augmentation that images alone can have.

    Args:
        images: (n, …), one example after another.
        crop: Pixels of random shift.
        flip: Whether half of the images are mirrored.

    Raises:
        ValueError: The examples are signals or rows of a table, or images of fewer pixels than the shift.
    """
    if images.ndim != 4 and (crop or flip):
        what = {2: "rows of a table", 3: "signals"}.get(images.ndim, f"tensors of {images.ndim - 1} dimensions")
        raise ValueError(
            f"expected images to shift or mirror, found {what} of shape {tuple(images.shape[1:])}; set the dataset's "
            "`augmentation: {crop: 0, flip: false}`"
        )
