"""Labelled images, decoded once: scikit-learn's digits, torchvision's sets, and folders or archives of images."""

import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from torch import Tensor

from paretoprune.tensors import save_tensors

TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
SOURCES = ("digits", *TORCHVISION_SETS, "imagefolder")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: uint8 (n, channels, height, width), 0 to 255.
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


def read_images(
    source: str, directory: Path, *, path: str | None = None, image_size: int | None = None, channels: int = 3
) -> ImageSet:
    """Read a whole dataset.

    Args:
        source: One of `SOURCES`.
        directory: Folder of torchvision's sets, which are downloaded if they are not there; relative paths start here.
        path: For `imagefolder`: a directory, or a tar archive of one, with `train/<class>/*` and optionally
            `test/<class>/*`.
        image_size: For `imagefolder`: side in pixels. The shorter side is scaled to it and the centre is cropped. None
            if all images have the same size already.
        channels: For `imagefolder`: 3 for colour, 1 for grey.

    Raises:
        FileNotFoundError: The images are not there, and cannot be downloaded.
        ValueError: The source is unknown; a file is no image; sizes differ; or the folders of classes do not fit.
    """
    if source == "digits":
        return _digits()
    if source in TORCHVISION_SETS:
        return _torchvision_set(TORCHVISION_SETS[source], directory)
    if source == "imagefolder":
        if path is None:
            raise ValueError("an imagefolder dataset needs `path`, the directory or tar archive with train/<class>/*")
        return _image_folder(directory / path, image_size, channels)
    raise ValueError(f"expected a dataset source among {', '.join(SOURCES)}, found '{source}'")


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


def _image_folder(path: Path, image_size: int | None, channels: int) -> ImageSet:
    if channels not in (1, 3):
        raise ValueError(f"expected channels 1 (grey) or 3 (colour), found {channels}")
    if not path.exists():
        raise FileNotFoundError(
            f"expected images at '{path}', found nothing; correct the dataset's `path` or `data_directory`"
        )
    entries: list[tuple[str, str, np.ndarray]] = []
    unreadable: list[str] = []
    for part, label, name, handle in _image_files(path):
        try:
            entries.append((part, label, _decode(handle, image_size, channels)))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} files in '{path}' are no readable images: {', '.join(unreadable[:5])}"
            f"{', …' if len(unreadable) > 5 else ''}; repair or remove them"
        )
    classes = tuple(sorted({label for part, label, _ in entries if part == "train"}))
    if not classes:
        raise ValueError(f"expected images at '{path}' as train/<class>/<image>, found none; arrange them so")
    only_in_test = sorted({label for part, label, _ in entries if part == "test"} - set(classes))
    if only_in_test:
        raise ValueError(
            f"classes {', '.join(only_in_test)} are in '{path}' under test/ but not under train/; add training images "
            "or remove them"
        )
    sizes = sorted({image.shape[1:] for _, _, image in entries})
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size in '{path}', found {len(sizes)}, from {sizes[0]} to {sizes[-1]}; "
            "give the dataset an `image_size` in pixels"
        )
    index = {label: i for i, label in enumerate(classes)}
    return ImageSet(
        torch.from_numpy(np.stack([image for _, _, image in entries])),
        torch.tensor([index[label] for _, label, _ in entries], dtype=torch.int64),
        torch.tensor([part == "test" for part, _, _ in entries], dtype=torch.bool),
        classes,
    )


def _image_files(path: Path) -> Iterator[tuple[str, str, str, BinaryIO]]:
    """Yield every file under train/<class>/ and test/<class>/ in a fixed order, as (part, class, name, open file)."""
    if path.is_dir():
        for file in sorted(path.glob("*/*/*")):
            part, label = file.relative_to(path).parts[:2]
            if part in ("train", "test") and label[0] != "." and file.name[0] != "." and file.is_file():
                with file.open("rb") as handle:
                    yield part, label, str(file), handle
        return
    try:
        with tarfile.open(path) as archive:
            # Never unpacked, so no member can be written outside the folder. Not sorted either: seeking back in a
            # compressed archive decompresses it from the start.
            for member in archive:
                parts = PurePosixPath(member.name).parts[-3:]
                hidden = any(part.startswith(".") for part in parts)
                if member.isfile() and len(parts) == 3 and parts[0] in ("train", "test") and not hidden:
                    content = archive.extractfile(member)
                    assert content is not None  # None is for members that are no files
                    yield parts[0], parts[1], member.name, io.BytesIO(content.read())
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected a directory or a tar archive at '{path}', but: {reason}; give another `path`"
        ) from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel."""
    # Pillow's own conversion clips 16-bit grey at 255, which is white.
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.float64) * (255 / 65535), 0, 255).astype(np.uint8))


def _decode(handle: BinaryIO, image_size: int | None, channels: int) -> np.ndarray:
    """One image as uint8 (channels, height, width)."""
    with Image.open(handle) as opened:
        image = _to_8_bit(opened).convert("RGB" if channels == 3 else "L")
    if image_size is not None and image.size != (image_size, image_size):
        scale = image_size / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + image_size, top + image_size))
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(np.moveaxis(array, 2, 0))
