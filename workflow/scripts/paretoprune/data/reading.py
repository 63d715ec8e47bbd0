"""Datasets by their source, decoded once: embedded digits, torchvision's sets, image folders, and arrays."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretoprune.data.arrays import ArrayFile, read_npz_file, read_safetensors_file
from paretoprune.data.datasets import ImageSet
from paretoprune.data.folders import ImageFolder, read_image_folder

TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
# Sources of the user's own data: what can be set, and what reads them.
OWN_SOURCES: dict[str, tuple[type[Any], Callable[[Path, Any, logging.Logger], ImageSet]]] = {
    "imagefolder": (ImageFolder, read_image_folder),
    "npz": (ArrayFile, read_npz_file),
    "safetensors": (ArrayFile, read_safetensors_file),
}
SOURCES = ("digits", *TORCHVISION_SETS, *OWN_SOURCES)


def read_images(source: str, directory: Path, *, log: logging.Logger | None = None, **settings: Any) -> ImageSet:
    """Read a whole dataset.

    Args:
        source: One of `SOURCES`.
        directory: Where torchvision's sets are kept, and downloaded to when absent; relative paths start here.
        log: Told what was found; None for the package's own logger.
        settings: Of one's own data, the fields of `folders.ImageFolder` or `arrays.ArrayFile`.

    Raises:
        FileNotFoundError: The images are not there.
        ValueError: Unknown source or setting, or files that are not what the source says.
    """
    if source in OWN_SOURCES:
        kind, read = OWN_SOURCES[source]
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        try:
            how = kind(**values)
        except TypeError as error:
            raise ValueError(
                f"source '{source}' cannot be read with {', '.join(settings)} ({error}); correct it"
            ) from None
        return read(directory, how, log or logging.getLogger("paretoprune"))
    if source not in SOURCES:
        raise ValueError(f"expected a dataset source among {', '.join(SOURCES)}, found '{source}'")
    if settings:
        raise ValueError(f"{', '.join(settings)} do not fit source '{source}'; remove them")
    return _digits() if source == "digits" else _torchvision_set(TORCHVISION_SETS[source], directory)


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The 8x8 images have 17 grey levels, 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    return ImageSet(torch.from_numpy(images), labels, is_test, tuple(str(c) for c in digits.target_names))


def _torchvision_set(name: str, directory: Path) -> ImageSet:
    from torchvision import datasets

    def read(train: bool) -> Any:
        try:
            return getattr(datasets, name)(root=directory, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{name} is not in '{directory}' and could not be downloaded ({error}); connect to the network once, "
                "or copy torchvision's files there"
            ) from error

    parts = [read(train) for train in (True, False)]
    arrays = [np.asarray(part.data) for part in parts]
    # CIFAR is (n, h, w, 3), Fashion-MNIST (n, h, w).
    images = [np.moveaxis(a, 3, 1) if a.ndim == 4 else a[:, None] for a in arrays]
    labels = [torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]
    is_test = torch.repeat_interleave(torch.tensor([False, True]), torch.tensor([len(a) for a in arrays]))
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(np.concatenate(images))),
        torch.cat(labels),
        is_test,
        tuple(parts[0].classes),
    )
