"""Which image is for what: train, calibration, search and test splits, disjoint, stratified and fixed by a seed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paretoprune.data.datasets import ImageSet
from paretoprune.files import read_npz, write_npz

SPLITS = ("train", "calibration", "search", "test")


@dataclass(frozen=True)
class Splits:
    """Indices of the images of each split, int64, pairwise disjoint.

    Calibration and search indices are in random order: a step that takes the first few of them gets all classes. Train
    and test indices are sorted.

    Attributes:
        train: For training the dense network, for gradients, and for fine-tuning.
        calibration: For layer and batch-norm statistics; the labels are never used.
        search: For evaluating candidates; the only labels that the search uses.
        test: For measuring each finished network once.
    """

    train: np.ndarray
    calibration: np.ndarray
    search: np.ndarray
    test: np.ndarray

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the indices to an npz file."""
        write_npz(path, {name: getattr(self, name) for name in SPLITS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Splits":
        """Read what `save` wrote."""
        arrays = read_npz(path)
        return cls(*(arrays[name] for name in SPLITS))


def split_images(
    labels: np.ndarray, is_test: np.ndarray, *, calibration: float, search: float, test: float, seed: int
) -> Splits:
    """Divide images into the four splits, each with the class shares of the whole.

    Args:
        labels: int (n,), class indices.
        is_test: bool (n,), images that are test images already; where there are any, `test` is not used.
        calibration: Size of the calibration split: a number of images (>= 1), a share of the images that are not test
            images already (< 1), or 0 for an empty split.
        search: Size of the search split, likewise.
        test: Size of the test split, likewise.
        seed: Fixes the choice.

    Raises:
        ValueError: A class has too few images for all splits; a size is too small to hold every class or leaves too few
            images to train on; or the search split holds a single class.
    """
    # Imported here, because every step reads splits and only one makes them: the import takes seconds.
    from sklearn.model_selection import train_test_split

    pool, own_test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    sizes = {"calibration": calibration, "search": search} | ({} if len(own_test) else {"test": test})
    sizes = {name: size for name, size in sizes.items() if size}
    names, counts = np.unique(labels[pool], return_counts=True)
    needed = len(sizes) + 1
    if len(names) < 2 or counts.min() < needed:
        scarce = ", ".join(f"class {c} has {n}" for c, n in zip(names, counts, strict=True) if n < needed)
        raise ValueError(
            f"expected at least two classes with {needed} images each, to divide among train, {' and '.join(sizes)}; "
            f"found {len(names)} classes{f': {scarce}' if scarce else ''}; add images or leave the class out"
        )
    taken = {"calibration": pool[:0], "search": pool[:0]}
    rest = pool
    wanted = {name: size if size >= 1 else round(size * len(pool)) for name, size in sizes.items()}
    for name in sorted(wanted, key=("test", "search", "calibration").index):
        n = int(wanted[name])
        if n < len(names) or n > len(rest) - len(names):
            raise ValueError(
                f"expected a {name} split of {len(names)} to {len(rest) - len(names)} images, found {n}; "
                f"change `{name}` of the dataset"
            )
        left, n_left = np.unique(labels[rest], return_counts=True)
        if n_left.min() < 2:
            raise ValueError(
                f"expected at least two images of class {left[n_left.argmin()]} to take the {name} split from, found "
                f"{n_left.min()}; add images of it, leave the class out, or change `{name}` to take fewer"
            )
        rest, taken[name] = train_test_split(rest, test_size=n, stratify=labels[rest], random_state=seed)
    taken.setdefault("test", own_test)
    # train_test_split shuffles. The order of train and test does not matter, so they are sorted.
    taken |= {"train": np.sort(rest), "test": np.sort(taken["test"])}
    if search and len(np.unique(labels[taken["search"]])) < 2:
        raise ValueError(
            "the search split holds images of one class only, so every network that always answers it looks perfect; "
            "give the dataset a larger `search`, or classes of similar size"
        )
    return Splits(**{name: indices.astype(np.int64) for name, indices in taken.items()})


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and the standard deviation per channel, of a table per feature; 8 bits are scaled to [0, 1].

    Args:
        images: uint8 or float32 (n, channels, …), see `ImageSet.images`.

    Returns:
        Two tuples of length `channels`. A constant channel has standard deviation 1, so that it can be divided by.
    """
    values = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    others = tuple(dim for dim in range(images.ndim) if dim != 1)
    mean, std = values.mean(dim=others), values.std(dim=others)
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, torch.ones_like(std)).tolist())


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale 8-bit images to [0, 1], subtract the mean and divide by the standard deviation, per channel or feature.

    Args:
        images: uint8 or float32 (n, channels, …), see `ImageSet.images`.
        mean: One value per channel.
        std: One value per channel, positive.

    Returns:
        float32, same shape.

    Raises:
        ValueError: There are fewer or more values than channels.
    """
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"expected {images.shape[1]} values in the normalisation's mean and std, one per channel, "
            f"found {len(mean)} and {len(std)}; correct `normalisation` of the network"
        )
    shape = (1, -1, *[1] * (images.ndim - 2))
    values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return (values - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


@dataclass(frozen=True)
class LabelledImages:
    """One split, ready for a network.

    Attributes:
        images: float32 (n, channels, height, width), normalised; signals (n, channels, length), tables (n, features).
        labels: int64 (n,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(
        cls, image_set: ImageSet, indices: np.ndarray, mean: Sequence[float], std: Sequence[float]
    ) -> "LabelledImages":
        """The images at `indices`, normalised."""
        chosen = torch.from_numpy(indices)
        return cls(normalise(image_set.images[chosen], mean, std), image_set.labels[chosen])

    def to(self, device: str | torch.device) -> "LabelledImages":
        """The same images on a device."""
        return LabelledImages(self.images.to(device), self.labels.to(device))

    def first(self, n: int | None) -> "LabelledImages":
        """The first `n` images; all of them if there are fewer or `n` is None."""
        return LabelledImages(self.images[:n], self.labels[:n])

    def sample(self, n: int, seed: int) -> "LabelledImages":
        """`n` random images in random order; all of them if there are fewer."""
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(self))[:n])
        return LabelledImages(self.images[chosen], self.labels[chosen])
