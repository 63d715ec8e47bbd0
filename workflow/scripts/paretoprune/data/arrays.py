"""Arrays in npz and safetensors files as a dataset: images, signals and tables."""

import json
import logging
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from paretoprune.data.datasets import ImageSet, check_augmentation
from paretoprune.data.decoding import check_value_range

INPUTS = ("images", "image", "x", "data", "features", "signals", "inputs")
LABELS = ("labels", "label", "y", "targets", "target")
PARTS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
IS_TEST, CLASSES = "is_test", "classes"
LAYOUTS = ("channels_first", "channels_last", "grey")
# Numbers of channels that an image is expected to have.
CHANNELS = (1, 2, 3, 4)
SAVE = (
    "save it with numpy.savez(path, images=images.astype('float32'), labels=labels.astype('int64')), arrays of numbers "
    "alone"
)
N_NAMED = 5


@dataclass(frozen=True)
class ArrayFile:
    """A file of arrays, and what they mean.

    Attributes:
        path: The file.
        layout: Where images and signals have their channels: `channels_first`, `channels_last`, or `grey` for images
            (n, height, width) that have none; None where the shape says it.
        value_range: What black and white are in images: `type` for the range of integers without sign, and floats as
            they are; `data` for the smallest and largest value; or these two numbers.
        augmentation: Of training images, to refuse at once what does not fit signals and tables.
    """

    path: str | None = None
    layout: str | None = None
    value_range: str | tuple[float, float] = "type"
    augmentation: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"expected layout {', '.join(LAYOUTS)} or null, found '{self.layout}'")
        check_value_range(self.value_range)


def read_npz_file(directory: Path, how: ArrayFile, log: logging.Logger) -> ImageSet:
    """Read an npz file, never by unpickling; see `image_set_of`."""
    path = _place(directory, how, "npz")
    try:
        # Numpy leaves the file open where it is damaged.
        with path.open("rb") as handle:
            content = np.load(handle, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array without a name")
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "allow_pickle" in reason or "pickled" in reason:
            reason = "it holds Python objects, such as lists of unequal lengths, which could run code"
        raise ValueError(f"expected an npz file of arrays at '{path}', but: {reason}; {SAVE}") from error
    return image_set_of(arrays, path, how, log)


def read_safetensors_file(directory: Path, how: ArrayFile, log: logging.Logger) -> ImageSet:
    """Read a safetensors file, whose metadata may have `classes` (names as JSON); see `image_set_of`."""
    path = _place(directory, how, "safetensors")
    arrays: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="pt") as content:
            for name in list(content.keys()):
                tensor = content.get_tensor(name)
                # Numpy has no bfloat16.
                arrays[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            classes = json.loads((content.metadata() or {}).get(CLASSES, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"expected a safetensors file at '{path}', but: {error}; save it with safetensors.torch.save_file("
            "{'images': images, 'labels': labels}, path)"
        ) from error
    if classes is not None:
        arrays[CLASSES] = np.array(classes)
    return image_set_of(arrays, path, how, log)


def _place(directory: Path, how: ArrayFile, source: str) -> Path:
    if how.path is None:
        raise ValueError(f"a dataset of source {source} needs `path`, the file with the arrays images and labels")
    path = directory / how.path
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a file of arrays at '{path}', found none; correct the dataset's `path` or `data_directory`"
        )
    return path


def image_set_of(arrays: Mapping[str, np.ndarray], path: Path, how: ArrayFile, log: logging.Logger) -> ImageSet:
    """Images, signals or rows of a table with their labels, from arrays by name.

    Names are `images` and `labels`, or the same with the part they belong to: `train_images`, `test_labels`; other
    words for them are those in `INPUTS` and `LABELS`. Without a test part, `is_test` (bool, n) may set images
    apart, and `classes` may name the classes that the labels 0, 1, … stand for.

    Args:
        arrays: Images (n, channels, height, width) or (n, height, width, channels), signals (n, channels, length),
            tables (n, features). Labels are whole numbers or names, (n,) or (n, 1), or rows with a single 1.
        path: The file, for messages.
        how: What arrays mean.
        log: Told what was found.

    Raises:
        ValueError: Arrays that are missing, do not fit together, or can be understood in two ways.
    """
    parts = _parts_of(arrays, path)
    test_part = "test" if "test" in parts else "val"
    inputs, labels, is_test = [], [], []
    for part, (images_name, labels_name) in parts.items():
        images, own = arrays[images_name], _labels_of(arrays[labels_name], labels_name, path)
        if images.ndim == 0 or len(images) != len(own):
            raise ValueError(
                f"expected a label for each of the {len(images) if images.ndim else 0} examples of '{images_name}' in "
                f"'{path}', found {len(own)} in '{labels_name}'; save them in the same order and number"
            )
        inputs.append(_inputs_of(images, images_name, path, how))
        labels.append(own)
        is_test.append(np.full(len(own), part == test_part))
        if part == "val":
            as_what = (
                "taken as test images: there are none" if test_part == "val" else "divided like those for training"
            )
            log.info("%d examples of '%s' are %s", len(own), images_name, as_what)
    if len({one.shape[1:] for one in inputs}) > 1 or len({one.dtype for one in inputs}) > 1:
        found = ", ".join(
            f"{name} {one.dtype} {one.shape[1:]}" for (name, _), one in zip(parts.values(), inputs, strict=True)
        )
        raise ValueError(f"expected examples of one shape and type in '{path}', found {found}; save them alike")
    tested = np.concatenate(is_test)
    if IS_TEST in arrays:
        tested = _is_test_of(arrays[IS_TEST], tested, path)
    values = _scaled(np.concatenate(inputs), path, how, log)
    indices, classes = _classes_of(labels, tested, arrays.get(CLASSES), path, log)
    if how.augmentation is not None:
        check_augmentation(torch.from_numpy(values), int(how.augmentation["crop"]), bool(how.augmentation["flip"]))
    used = {IS_TEST, CLASSES, *(name for pair in parts.values() for name in pair)}
    if unused := [name for name in arrays if name not in used]:
        log.info("arrays that are not used: %s", ", ".join(unused[:N_NAMED]))
    what = {2: "rows of a table", 3: "signals", 4: "images"}[values.ndim]
    low, high = float(values.min()), float(values.max())
    log.info("%d %s of shape %s, %s, from %g to %g", len(values), what, values.shape[1:], values.dtype, low, high)
    return ImageSet(torch.from_numpy(values), torch.from_numpy(indices), torch.from_numpy(tested), classes)


# Which arrays there are


def _parts_of(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, tuple[str, str]]:
    """The names of the inputs and labels of each part, training first."""
    found: dict[str, dict[str, str]] = {}
    for name in arrays:
        if name in (IS_TEST, CLASSES):
            continue
        role, part = _role_of(name)
        if role is None:
            continue
        own = found.setdefault(part, {})
        if role in own:
            raise ValueError(
                f"arrays '{own[role]}' and '{name}' in '{path}' can both be the {role} of part {part}; leave one out"
            )
        own[role] = name
    incomplete = [f"{part} has {' and '.join(own.values())} alone" for part, own in found.items() if len(own) < 2]
    if "train" not in found or incomplete:
        there = ", ".join(arrays) or "nothing"
        raise ValueError(
            f"expected arrays images and labels in '{path}', or train_images, train_labels, test_images and "
            f"test_labels, found {there}{f' ({incomplete[0]})' if incomplete else ''}; name them so (x and y stand "
            "for images and labels too)"
        )
    order = [part for part in ("train", "val", "test") if part in found]
    return {part: (found[part]["inputs"], found[part]["labels"]) for part in order}


def _role_of(name: str) -> tuple[str | None, str]:
    """Whether an array holds inputs or labels, and of which part."""
    words = name.lower().split("_")
    part = next((word for word in words if word in PARTS), None)
    rest = [word for word in words if word != part]
    role = None
    if len(rest) == 1:
        role = "inputs" if rest[0] in INPUTS else "labels" if rest[0] in LABELS else None
    return role, PARTS[part] if part else "train"


def _is_test_of(flags: np.ndarray, tested: np.ndarray, path: Path) -> np.ndarray:
    if tested.any():
        raise ValueError(f"'{path}' has both {IS_TEST} and a part of test images; leave one out")
    whole = flags.shape == tested.shape and flags.dtype.kind in "bui" and bool(np.isin(flags, (0, 1)).all())
    if not whole or flags.all():
        raise ValueError(
            f"expected {IS_TEST} in '{path}' to be True for test images and False for others, of shape {tested.shape}, "
            f"found {flags.dtype} of shape {flags.shape}{' that is True for all' if whole else ''}; correct it"
        )
    return flags.astype(bool)


# Labels


def _labels_of(labels: np.ndarray, name: str, path: Path) -> np.ndarray:
    """One label for each example, whole numbers or names."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    kind = labels.dtype.kind
    if labels.ndim == 2 and kind in "buif":
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise ValueError(
                f"expected rows with a single 1 in '{name}' in '{path}' of shape {labels.shape}, found others; "
                "networks that give several labels or shares to an example are not supported: give one label each"
            )
        return labels.argmax(axis=1)
    if labels.ndim != 1 or kind not in "buifUS":
        raise ValueError(
            f"expected one label for each example in '{name}' in '{path}', (n,) or (n, 1) or rows with a single 1, "
            f"found {labels.dtype} of shape {labels.shape}; save one class index for each"
        )
    if kind in "US":
        return labels.astype(str)
    if kind == "f" and not (np.isfinite(labels).all() and (labels == np.rint(labels)).all()):
        raise ValueError(
            f"expected whole numbers as labels in '{name}' in '{path}', found others, such as "
            f"{labels[labels != np.rint(labels)][0]}; only classes can be learnt, no other values"
        )
    return labels.astype(np.int64)


def _classes_of(
    parts: list[np.ndarray], tested: np.ndarray, names: np.ndarray | None, path: Path, log: logging.Logger
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The index of each example's class, and what the classes are called."""
    if len({one.dtype.kind for one in parts}) > 1:
        raise ValueError(f"expected labels of one kind in '{path}', found names and numbers; save them alike")
    labels = np.concatenate(parts)
    known = np.unique(labels[~tested])
    if strangers := sorted(set(labels[tested].tolist()) - set(known.tolist())):
        raise ValueError(
            f"labels {', '.join(map(str, strangers[:N_NAMED]))} in '{path}' are of test images alone; add training "
            "images with them or remove theirs"
        )
    if names is not None:
        return _named(labels, known, names, path)
    if known.dtype.kind == "U":
        log.info("classes, sorted as text: %s", ", ".join(known[:10]))
        if all(name.isdecimal() for name in known.tolist()) and known.tolist() != sorted(known.tolist(), key=int):
            log.warning("the labels are numbers saved as text, and sorted so: 10 comes before 2; save whole numbers")
    elif len(known) > 1 and known[0] < 0 and known.tolist() != [-1, 1]:
        raise ValueError(
            f"expected labels from 0 on in '{path}', found {known[0]}, which often stands for no label; leave these "
            "examples out"
        )
    elif known.tolist() != list(range(len(known))):
        shown = ", ".join(f"{label} is class {i}" for i, label in enumerate(known[:N_NAMED].tolist()))
        log.warning("labels are not 0 to %d and are numbered in their order: %s", len(known) - 1, shown)
    return np.searchsorted(known, labels).astype(np.int64), tuple(str(label) for label in known.tolist())


def _named(labels: np.ndarray, known: np.ndarray, names: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Indices and names of classes that the file names itself."""
    names = names.astype(str) if names.dtype.kind == "S" else names
    classes = tuple(str(name) for name in names.ravel().tolist())
    if names.ndim != 1 or len(set(classes)) != len(classes):
        raise ValueError(f"expected a list of different names as '{CLASSES}' in '{path}', found {classes[:N_NAMED]}")
    indices = {name: i for i, name in enumerate(classes)} if known.dtype.kind == "U" else range(len(classes))
    if strangers := [label for label in known.tolist() if label not in indices]:
        raise ValueError(
            f"labels {', '.join(map(str, strangers[:N_NAMED]))} in '{path}' are none of its {len(classes)} `{CLASSES}` "
            "(names, or numbers from 0 on); correct one of them"
        )
    found = np.array([indices[label] for label in known.tolist()], dtype=np.int64)
    if unseen := sorted(set(range(len(classes))) - set(found.tolist())):
        raise ValueError(
            f"classes {', '.join(classes[i] for i in unseen[:N_NAMED])} in '{path}' have no training images; add some "
            "or remove the classes"
        )
    return found[np.searchsorted(known, labels)], classes


# Inputs


def _inputs_of(values: np.ndarray, name: str, path: Path, how: ArrayFile) -> np.ndarray:
    """Examples with their channels first."""
    if values.dtype.kind not in "buif" or not values.size:
        raise ValueError(
            f"expected numbers in '{name}' in '{path}', found {values.dtype} of shape {values.shape}; save whole "
            "numbers or floats"
        )
    if values.dtype.kind == "f" and (n_odd := int((~np.isfinite(values)).sum())):
        raise ValueError(
            f"{n_odd} values of '{name}' in '{path}' are not finite; replace them or leave the examples out"
        )
    if values.ndim not in (2, 3, 4):
        raise ValueError(
            f"expected images (n, channels, height, width), signals (n, channels, length) or a table (n, features) as "
            f"'{name}' in '{path}', found shape {values.shape}; bring it into one of these shapes"
        )
    return np.ascontiguousarray(_channels_first(values, name, path, how.layout))


def _channels_first(values: np.ndarray, name: str, path: Path, layout: str | None) -> np.ndarray:
    shape = values.shape
    if values.ndim == 2:
        if layout is not None:
            raise ValueError(f"'{name}' in '{path}' is a table of shape {shape} and has no `layout`; remove it")
        return values
    if layout == "grey" and values.ndim == 4:
        raise ValueError(
            f"`layout: grey` is for images (n, height, width), found '{name}' of shape {shape} in '{path}'; correct it"
        )
    if layout is None and values.ndim == 4:
        first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
        if first == last:
            both = "the first or the last" if first else "neither the first nor the last"
            raise ValueError(
                f"'{name}' in '{path}' has shape {shape}, where {both} of the three sizes can be channels; give the "
                "dataset `layout: channels_first` or `layout: channels_last`"
            )
        layout = "channels_first" if first else "channels_last"
    if layout is None and (values.dtype == np.uint8 or shape[1] == shape[2]):
        raise ValueError(
            f"'{name}' in '{path}' has {values.dtype} of shape {shape}, which can be grey images (n, height, width) or "
            "signals (n, channels, length); give the dataset `layout: grey`, or for signals `layout: channels_first` "
            "or `layout: channels_last`"
        )
    if layout == "grey":
        return values[:, None]
    return np.moveaxis(values, -1, 1) if layout == "channels_last" else values


def _scaled(values: np.ndarray, path: Path, how: ArrayFile, log: logging.Logger) -> np.ndarray:
    """Images as uint8, or float32 in the range that the setting gives; anything else as float32."""
    if values.ndim != 4:
        if how.value_range != "type":
            raise ValueError(f"`value_range` is for images, found shape {values.shape[1:]} in '{path}'; remove it")
        return _as_float32(values, path)
    low, high = float(values.min()), float(values.max())
    head = f"images of type {values.dtype} in '{path}' have values from {low:g} to {high:g}"
    if how.value_range == "type":
        if values.dtype == np.uint8:
            if 0 < high < 128:
                log.warning(
                    "%s, of which 255 is taken for white: they are dark; give the dataset `value_range: [0, %g]` where "
                    "their largest value is white",
                    head,
                    high,
                )
            return values
        if values.dtype.kind == "f":
            return _as_float32(values, path)
        black, white = (0.0, float(np.iinfo(values.dtype).max)) if values.dtype == np.uint16 else (0.0, 1.0)
        if values.dtype not in (np.uint16, np.bool_) or (values.dtype == np.uint16 and 0 < high < white / 2):
            raise ValueError(
                f"{head}, which does not say what is black and what is white; give the dataset `value_range: [black, "
                "white]`, or `value_range: data` for the values found"
            )
    else:
        black, white = (low, high) if isinstance(how.value_range, str) else how.value_range
        if low < black or high > white:
            raise ValueError(f"{head}, beyond `value_range` [{black:g}, {white:g}]; widen it")
        if black == white:
            raise ValueError(f"{head}; `value_range: data` cannot scale a single value")
    log.info("images are scaled from %g (black) to %g (white)", black, white)
    return _as_float32((values.astype(np.float64) - black) / (white - black), path)


def _as_float32(values: np.ndarray, path: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"values in '{path}' are too large for float32; scale them to about -1 to 1")
    return found
