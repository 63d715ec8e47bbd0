"""What people bring as images and labels, as two tensors: arrays, lists, data sets and loaders, checked once."""

import copy
import logging
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from paretoprune.data.splits import LabelledImages, split_images

# Images that are held out for the search, at most.
N_HELD_OUT = 2000
BATCH_SIZE = 256
# Keys under which batches that are mappings hold images and labels.
IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "input", "inputs", "data", "features")
LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")
# What torch says of examples that it cannot put into a batch.
NOT_STACKED = ("default_collate: ", "stack expects each tensor", "should be of equal size", "resize storage")
_SHAPES = "(n, c, h, w), signals (n, c, t) or tables (n, features)"
_LOGGER = logging.getLogger("paretoprune")


def gather_splits(
    images: Any, labels: Any, search_images: Any, search_labels: Any, *, max_images: int, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Training and search images: those given, or a fifth of the images held out for the search.

    Args:
        images: See `gather`.
        labels: Their labels; None where `images` yields both.
        search_images: Likewise; None to hold some of the images out.
        search_labels: Their labels.
        max_images: Taken from a loader or a data set.
        seed: Fixes what is held out and what is drawn from a data set.

    Raises:
        ValueError: Images or labels cannot be used.
    """
    train = gather(images, labels, "images", "labels", max_images=max_images, seed=seed)
    if search_images is None and search_labels is None:
        nothing = np.zeros(len(train), dtype=bool)
        n_search = max(min(N_HELD_OUT, len(train) // 5), len(train.labels.unique()))
        splits = split_images(train.labels.numpy(), nothing, calibration=0, search=n_search, test=0, seed=seed)
        search = LabelledImages(train.images[splits.search], train.labels[splits.search])
        return LabelledImages(train.images[splits.train], train.labels[splits.train]), search
    if search_images is None or (search_labels is None and not yields_batches(search_images)):
        raise ValueError(
            "search_images and search_labels belong together; give both or neither, or a DataLoader or Dataset that "
            "yields both as search_images"
        )
    search = gather(search_images, search_labels, "search_images", "search_labels", max_images=max_images, seed=seed)
    if search.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"expected search_images of the shape of images, {tuple(train.images.shape[1:])}, found "
            f"{tuple(search.images.shape[1:])}; prepare both alike"
        )
    if len(search.labels.unique()) < 2:
        raise ValueError("expected search images of at least two classes, found one; give a mixed set")
    return train, search


def yields_batches(images: Any) -> bool:
    """Whether what is given as images yields labels too: a loader, a data set or another iterable of batches."""
    return not isinstance(images, Tensor | np.ndarray | list | tuple | str | bytes | Mapping) and (
        isinstance(images, Dataset | DataLoader)
        or (isinstance(images, Iterable) and not hasattr(images, "__array__"))
        or (hasattr(images, "__getitem__") and hasattr(images, "__len__") and not hasattr(images, "__array__"))
    )


def gather(images: Any, labels: Any, name: str, labels_name: str, *, max_images: int, seed: int) -> LabelledImages:
    """Images as contiguous float32 and labels as int64, on the CPU, apart from the caller's autograd.

    Args:
        images: A tensor, an array or a list of them, (n, ...) with at least two dimensions; or what yields batches of
            images and labels (`DataLoader`), or single ones (`Dataset`).
        labels: int (n,) or (n, 1), class indices, or one-hot (n, n_classes); None where `images` yields both.
        name: Of the images, for errors.
        labels_name: Of the labels.
        max_images: Taken from what yields them; a data set that holds more is drawn from at random.
        seed: Fixes what a data set or loader draws, where it draws from the global generators.

    Raises:
        ValueError: Images or labels cannot be used; the message says what was expected.
    """
    if isinstance(images, str | bytes | os.PathLike):
        raise ValueError(
            f"expected {name} themselves, found the path {str(images)!r}; load them, as with "
            "torchvision.datasets.ImageFolder(path, transform), or use the workflow, which reads folders"
        )
    if yields_batches(images):
        if labels is not None:
            raise ValueError(
                f"expected no {labels_name} beside {name} that yield batches with labels of their own, found both; "
                f"leave {labels_name} out"
            )
        return _checked(*_gathered(images, name, max_images, seed), name, labels_name)
    if labels is None:
        raise ValueError(
            f"expected {labels_name} for {name}, found none; give one class index for each image, or a DataLoader or "
            f"Dataset that yields both as {name}"
        )
    return _checked(_as_images(images, name), _as_labels(labels, labels_name), name, labels_name)


def gather_images(images: Any, name: str, *, max_images: int, seed: int) -> Tensor:
    """Images alone, in any of the forms that `gather` takes; labels that come with them are left out.

    Args:
        images: As for `gather`; batches may hold images only.
        name: Of the images, for errors.
        max_images: Taken from what yields them.
        seed: Fixes what a data set or loader draws.

    Raises:
        ValueError: The images cannot be used.
    """
    if yields_batches(images):
        found, _ = _gathered(images, name, max_images, seed, labelled=False)
    else:
        found = _as_images(images, name)
    return _checked_images(found, name)


def _checked_images(images: Tensor, name: str) -> Tensor:
    if not len(images):
        raise ValueError(f"expected at least one image in {name}, found none")
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"expected finite {name}, found NaN or infinite values; clean the data")
    return images


def _checked(images: Tensor, labels: Tensor, name: str, labels_name: str) -> LabelledImages:
    if not len(images):
        raise ValueError(f"expected at least one image in {name}, found none")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected one label for each of {len(images)} {name}, found shape {tuple(labels.shape)}; "
            f"give {labels_name} as class indices (n,), (n, 1) or one-hot (n, n_classes)"
        )
    return LabelledImages(_checked_images(images, name), labels)


def _as_tensor(values: Any, name: str) -> Tensor:
    """Whatever holds numbers as a plain tensor on the CPU, outside the caller's autograd and inference mode."""
    if isinstance(values, list | tuple) and values and any(isinstance(value, Tensor) for value in values):
        values = [_as_tensor(value, name) for value in values]
        shapes = sorted({tuple(value.shape) for value in values})
        if len(shapes) > 1:
            raise ValueError(f"expected {name} of one shape, found {shapes[:3]}; bring them to one size first")
        return torch.stack(values)
    if isinstance(values, Tensor):
        if values.device.type == "meta":
            raise ValueError(f"expected {name} with values, found a tensor on the device 'meta'; load the data")
        if values.is_nested:
            raise ValueError(f"expected {name} of one shape, found a nested tensor; bring them to one size first")
        values = values.detach().cpu()
        values = (values.to_dense() if values.layout != torch.strided else values).as_subclass(Tensor)
        return values.clone() if values.is_inference() else values
    if np.ma.is_masked(values):
        raise ValueError(f"expected {name} with all their values, found masked ones; fill them in or leave them out")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"expected {name} of one shape, found a list that makes no array ({error}); bring them to one size first"
        ) from error
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"expected {name} as numbers, found {type(values).__name__} of dtype {array.dtype}; convert them to a "
            "tensor or an array of numbers"
        )
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            array = array.astype(np.float32)
    elif array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    # A copy: torch knows no read-only arrays, foreign byte orders or negative strides.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _as_images(images: Any, name: str) -> Tensor:
    """Images as contiguous float32."""
    tensor = _as_tensor(images, name)
    if tensor.ndim < 2 or not tensor.is_floating_point():
        remedy = "divide by 255 and normalise them" if tensor.dtype == torch.uint8 else "convert and normalise them"
        raise ValueError(
            f"expected {name} as normalised floats, images {_SHAPES}, found {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; {remedy} as for the network"
        )
    return tensor.float().contiguous()


def _as_labels(labels: Any, name: str) -> Tensor:
    """Class indices int64 (n,) from whole numbers (n,) or (n, 1), or from one-hot rows."""
    tensor = _as_tensor(labels, name)
    if tensor.ndim == 2 and tensor.shape[1] > 1:
        if not bool(((tensor == 0) | (tensor == 1)).all() & (tensor.sum(dim=1) == 1).all()):
            raise ValueError(
                f"expected {name} as class indices (n,) or one-hot (n, n_classes), found shape {tuple(tensor.shape)} "
                "with rows that are not a single 1 among zeros; give the index of each image's class"
            )
        return tensor.to(torch.uint8).argmax(dim=1)
    if tensor.is_floating_point():
        raise ValueError(
            f"expected whole-number labels in {name}, found {tensor.dtype}; give class indices, such as labels.long()"
        )
    return (tensor[:, 0] if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor).long()


def _gathered(source: Any, name: str, max_images: int, seed: int, *, labelled: bool = True) -> tuple[Tensor, Tensor]:
    """The first images and labels that batches hold, at most `max_images`; zeros for labels that are not wanted."""
    loader, n_all = _loader_of(source, name, max_images, seed)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    n = 0
    with _draws_of_its_own(source, seed):
        for batch in _batches_of(loader, name):
            if n >= max_images:
                _LOGGER.warning(
                    "of %s the first %d images are taken; raise max_images for more, and let the loader shuffle where "
                    "images lie sorted by class",
                    name,
                    max_images,
                )
                break
            x, y = _parts(batch, name) if labelled else (_images_of(batch, name), None)
            if isinstance(x, list | tuple) and x and all(isinstance(part, Tensor) and part.ndim > 1 for part in x):
                raise ValueError(
                    f"expected one tensor for the {name} of a batch, found {len(x)}; networks of several inputs are "
                    "not supported"
                )
            x = _as_images(x, name)
            y = torch.zeros(len(x), dtype=torch.int64) if y is None else _as_labels(y, f"the labels of {name}")
            if not y.ndim:
                raise ValueError(
                    f"expected batches from {name}, found a single image with its label; put them into a list, and "
                    "that into a DataLoader"
                )
            if images and x.shape[1:] != images[0].shape[1:]:
                raise ValueError(
                    f"expected {name} of one shape, found batches of {tuple(images[0].shape[1:])} and "
                    f"{tuple(x.shape[1:])}; bring them to one size first"
                )
            images.append(x[: max_images - n].clone())  # loaders may fill the same memory again
            labels.append(y[: max_images - n].clone())
            if len(y) != len(x):
                raise ValueError(f"expected one label for each of {len(x)} images of a batch of {name}, found {len(y)}")
            n += len(images[-1])
            if len(x) > len(images[-1]):
                _LOGGER.warning("of %s the first %d images are taken; raise max_images for more", name, max_images)
                break
    if n_all > max_images:
        _LOGGER.warning("of %d %s %d are drawn at random; raise max_images for more", n_all, name, max_images)
    if not images:
        raise ValueError(f"expected at least one image in {name}, found none")
    return torch.cat(images), torch.cat(labels)


def _loader_of(source: Any, name: str, max_images: int, seed: int) -> tuple[Iterable[Any], int]:
    """What yields the batches, and how many images a data set holds that is drawn from; 0 for loaders."""
    if isinstance(source, DataLoader):
        if source.num_workers and multiprocessing.current_process().daemon:
            # A daemon process may have no children.
            source = copy.copy(source)
            source.num_workers, source.timeout, source.prefetch_factor = 0, 0, None
        return source, 0
    if isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=BATCH_SIZE), 0
    if not hasattr(source, "__getitem__"):
        return source, 0
    if not hasattr(source, "__len__"):
        raise ValueError(f"expected a Dataset with a length as {name}, found {type(source).__name__} without; wrap it")
    n_all, chosen = len(source), source
    if n_all > max_images:
        drawn = np.sort(np.random.default_rng(seed).permutation(n_all)[:max_images])
        chosen = Subset(source, drawn.tolist())
    return DataLoader(chosen, batch_size=BATCH_SIZE), n_all


def _batches_of(loader: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches, or an error that says what keeps examples from being put into one."""
    try:
        yield from loader
    except (TypeError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if any(word in line for word in NOT_STACKED)), None)
        if reason is None:
            raise
        raise ValueError(
            f"expected {name} and labels that can be put into batches, found others ({reason}); let the data set give "
            "tensors of one size and class indices, as with transform=Compose([Resize((h, w)), ToTensor(), "
            "Normalize(mean, std)]) of torchvision.transforms"
        ) from error


def _parts(batch: Any, name: str) -> tuple[Any, Any]:
    """Images and labels of a batch: its first two parts, or those under the usual keys."""
    if isinstance(batch, Mapping):
        found = [next((key for key in keys if key in batch), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if None in found:
            raise ValueError(
                f"expected batches of {name} with images under one of {', '.join(IMAGE_KEYS)} and labels under one of "
                f"{', '.join(LABEL_KEYS)}, found the keys {', '.join(map(str, batch))}; rename them"
            )
        return batch[found[0]], batch[found[1]]
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise ValueError(
            f"expected batches (images, labels) from {name}, found {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, list | tuple) else ''}; yield the labels too"
        )
    return batch[0], batch[1]


def _images_of(batch: Any, name: str) -> Any:
    """Images of a batch: itself, its first part, or those under a usual key."""
    if isinstance(batch, Mapping):
        found = next((key for key in IMAGE_KEYS if key in batch), None)
        if found is None:
            raise ValueError(
                f"expected batches of {name} with images under one of {', '.join(IMAGE_KEYS)}, found the keys "
                f"{', '.join(map(str, batch))}; rename them"
            )
        return batch[found]
    return batch[0] if isinstance(batch, list | tuple) and len(batch) else batch


@contextmanager
def _draws_of_its_own(source: Any, seed: int) -> Iterator[None]:
    """Global generators start at the seed inside, so that equal calls see equal images, and are put back afterwards.

    A loader's own generators go on from where they are, and are put back too.
    """
    own = {id(g): g for g in _generators(source)}.values()
    states = [generator.get_state() for generator in own]
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def _generators(source: Any) -> list[torch.Generator]:
    holders = [source, *(getattr(source, part, None) for part in ("sampler", "batch_sampler"))]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
