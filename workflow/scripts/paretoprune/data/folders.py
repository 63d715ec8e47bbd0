"""Folders and archives of images, a folder for each class."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from paretoprune.data.datasets import ImageSet
from paretoprune.data.decoding import (
    DECODING_ERRORS,
    EIGHT_BITS,
    FRAMES,
    TAGGED,
    TRANSPARENT,
    Decoded,
    Decoding,
    decode,
    to_bytes,
)
from paretoprune.data.trees import ARCHIVE_ERRORS, Parts, Tree, tree_at

# What a folder beside the classes can be called, in small or capital letters.
PARTS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
# Folders that systems leave behind.
LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__pycache__", "lost+found")
# Documents and data that Pillow calls images.
NO_PICTURES = (".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".pdf", ".ps", ".wmf")
# Pictures that Pillow does not read (some versions and plugins read some of them).
OTHER_PICTURES = (".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".heic", ".heif", ".jxl", ".nef", ".svg")
# What is tried on a file without an ending, each recognised by its first bytes.
BY_CONTENT = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
N_NAMED = 5


@dataclass(frozen=True)
class ImageFolder(Decoding):
    """A folder or an archive of images, and how they are decoded.

    Attributes:
        path: A directory or a tar or zip archive with train/<class>/<image> and, where there are test images,
            test/<class>/<image> or val/<class>/<image>.
    """

    path: str | None = None


@dataclass(frozen=True)
class Entry:
    """An image file: where it belongs, and where it lies."""

    part: str
    label: str
    parts: Parts


@dataclass(frozen=True)
class Listing:
    """What a tree holds.

    Attributes:
        entries: Image files, in the order of the tree.
        part_names: What the folders of each part are called.
        classes: Classes of the part `train` that have a folder or files.
        broken: Image files that cannot be read, with the reason.
        skipped: Files that are no images, by what they are, with an example.
        outside: Files of a part that lie in no class, and files beside the parts.
        root: The folders around the parts.
        beside: Folders that lie where the parts should.
    """

    entries: list[Entry]
    part_names: dict[str, str]
    classes: set[str]
    broken: dict[Parts, str]
    skipped: dict[str, list[str]]
    outside: list[str]
    root: Parts
    beside: list[str]


def read_image_folder(directory: Path, how: ImageFolder, log: logging.Logger) -> ImageSet:
    """Read all images of a folder or an archive.

    Args:
        directory: Where relative paths start.
        how: The place, and how images are decoded.
        log: Told what was found, turned, scaled and skipped.

    Raises:
        FileNotFoundError: The path leads nowhere.
        ValueError: Files that cannot be read, or folders that are arranged otherwise.
    """
    if how.path is None:
        raise ValueError("an imagefolder dataset needs `path`, the directory or tar archive with train/<class>/*")
    path = directory / how.path
    if not path.exists():
        raise FileNotFoundError(
            f"expected images at '{path}', found nothing; correct the dataset's `path` or `data_directory`"
        )
    try:
        tree = tree_at(path)
        listing = list_images(tree)
        entries, decoded = _decode_all(tree, listing, how)
    except ARCHIVE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        kind = "zip" if path.suffix.lower() == ".zip" else "tar"
        raise ValueError(
            f"expected a directory or a {kind} archive at '{path}', but: {reason.rstrip(':')}; give another `path`: a "
            "directory, a tar archive (also compressed by gzip, bzip2 or xz) or a zip archive"
        ) from error
    if listing.broken:
        named = [f"{'/'.join(parts)} ({reason})" for parts, reason in listing.broken.items()]
        raise ValueError(
            f"{len(named)} files in '{path}' are no readable images: {', '.join(named[:N_NAMED])}"
            f"{', …' if len(named) > N_NAMED else ''}; repair or remove them"
        )
    classes = _classes_of(path, entries, listing)
    tested = _parts_for_testing({entry.part for entry in entries})
    _tell_files(listing, entries, tested, log)
    images = _scale_all(path, decoded, how, log)
    sizes = sorted({image.shape[1:] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size in '{path}', found {len(sizes)}, from {sizes[0]} to {sizes[-1]}; "
            "give the dataset an `image_size` in pixels"
        )
    _tell_images(decoded, entries, how, log)
    _tell_classes(classes, entries, tested, log)
    index = {label: i for i, label in enumerate(classes)}
    return ImageSet(
        torch.from_numpy(np.stack(images)),
        torch.tensor([index[entry.label] for entry in entries], dtype=torch.int64),
        torch.tensor([entry.part in tested for entry in entries], dtype=torch.bool),
        classes,
    )


# What lies where


def list_images(tree: Tree) -> Listing:
    """Find the image files of a tree, and say what the other files are."""
    root = _root_of(tree)
    found = Listing([], {}, set(), {}, {}, [], root, [])
    for parts in tree.folders:
        inner = parts[len(root) :]
        if parts[: len(root)] == root and 1 <= len(inner) <= 2 and not _is_hidden(inner):
            part = PARTS.get(inner[0].lower())
            if part is None and len(inner) == 1:
                found.beside.append(inner[0])
            elif part == "train" and len(inner) == 2:
                found.classes.add(_label(inner[1]))
    for parts in [*tree.files, *tree.broken]:
        inner = parts[len(root) :]
        if parts[: len(root)] != root or not inner or inner[0].lower() not in PARTS:
            if not _is_hidden(parts):
                found.outside.append("/".join(parts))
            continue
        kind = _kind_of(inner)
        if kind is not None:
            found.skipped.setdefault(kind, []).append("/".join(parts))
        elif len(inner) < 3 and parts not in tree.broken:
            found.outside.append("/".join(parts))
        elif parts in tree.broken:
            found.broken[parts] = tree.broken[parts]
        elif (ending := Path(inner[-1]).suffix.lower()) in OTHER_PICTURES and ending not in _endings():
            found.broken[parts] = f"Pillow does not read {ending}; convert it to PNG"
        else:
            part = PARTS[inner[0].lower()]
            found.part_names.setdefault(part, inner[0])
            found.entries.append(Entry(part, _label(inner[1]), parts))
        if len(inner) >= 3 and PARTS[inner[0].lower()] == "train" and not _is_hidden(inner[:-1]):
            found.classes.add(_label(inner[1]))
    return found


def _root_of(tree: Tree) -> Parts:
    """The folders around train and test: none, or as many as hold nothing else."""
    folders = {parts[:n] for parts in (*tree.files, *tree.broken) for n in range(1, len(parts))} | tree.folders
    folders = {parts for parts in folders if not _is_hidden(parts)}
    root: Parts = ()
    while True:
        inner = {parts[-1] for parts in folders if parts[:-1] == root}
        if len(inner) != 1:
            return root
        (only,) = inner
        below = {parts[-1].lower() for parts in folders if parts[:-1] == (*root, only)}
        # A folder called train can be a class's or hold the parts: their names together are no classes.
        if only.lower() in PARTS and not (below and below <= set(PARTS) and "train" in below):
            return root
        if not below:
            return root
        root = (*root, only)


def _kind_of(inner: Parts) -> str | None:
    """What a file is that is no image; None for an image."""
    if _is_hidden(inner):
        return "hidden"
    ending = Path(inner[-1]).suffix.lower()
    return None if not ending or ending in _endings() or ending in OTHER_PICTURES else ending


def _is_hidden(parts: Parts) -> bool:
    return any(part.startswith(".") or part in LEFT_BEHIND for part in parts)


def _endings() -> set[str]:
    """Endings of the image files that Pillow reads."""
    known = Image.registered_extensions()
    return {ending for ending, kind in known.items() if kind in Image.OPEN} - set(NO_PICTURES)


def _label(name: str) -> str:
    """The name of a class: systems write accents in two ways."""
    return unicodedata.normalize("NFC", name)


def _parts_for_testing(parts: Iterable[str]) -> set[str]:
    """The parts whose images are test images: test, or val where there is no test."""
    return {"test"} if "test" in parts else {"val"}


def _decode_all(tree: Tree, listing: Listing, how: Decoding) -> tuple[list[Entry], list[Decoded]]:
    """The images of a listing; what is broken is added to it."""
    by_parts = {entry.parts: entry for entry in listing.entries}
    entries, decoded = [], []
    before = set(tree.broken)
    for parts, handle in tree.read(by_parts):
        try:
            if not Path(parts[-1]).suffix and not _is_picture(handle):
                listing.skipped.setdefault("without an ending", []).append("/".join(parts))
                continue
            decoded.append(decode(handle, how))
            entries.append(by_parts[parts])
        except DECODING_ERRORS as error:
            reason = _not_an_image(handle) or (str(error) or type(error).__name__).splitlines()[0]
            if Path(parts[-1]).suffix.lower() in (".tif", ".tiff") and "cannot identify" in reason:
                reason += "; of TIFF, Pillow reads 1, 8 and 16 bits and grey 32-bit integers and floats"
            listing.broken[parts] = reason
    listing.broken.update({parts: tree.broken[parts] for parts in tree.broken if parts not in before})
    return entries, decoded


def _not_an_image(handle: BinaryIO) -> str:
    """What a broken image is in truth, by its first bytes; empty where they do not tell."""
    handle.seek(0)
    head = handle.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; run `git lfs pull` where it comes from"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page; download the image again"
    return "" if head else "empty"


def _is_picture(handle: BinaryIO) -> bool:
    try:
        with Image.open(handle, formats=BY_CONTENT):
            pass
    except DECODING_ERRORS:
        return False
    finally:
        handle.seek(0)
    return True


def _classes_of(path: Path, entries: Sequence[Entry], listing: Listing) -> tuple[str, ...]:
    """The classes of the training images, sorted as text."""
    classes = tuple(sorted({entry.label for entry in entries if entry.part == "train"}))
    if not classes:
        skipped = [f"{len(files)} {kind}" for kind, files in sorted(listing.skipped.items()) if kind != "hidden"]
        there = sorted({*skipped, *listing.beside, *(name.split("/")[len(listing.root)] for name in listing.outside)})
        raise ValueError(
            f"expected images at '{path}' as train/<class>/<image>, found none; arrange them so"
            f"{f' (there is: {_some(there)})' if there else ''}"
        )
    if empty := sorted(listing.classes - set(classes)):
        raise ValueError(
            f"classes {', '.join(empty)} in '{path}' have a folder under {listing.part_names['train']}/ but no images "
            "there; add training images or remove the folders, for classes are numbered in the order of their names"
        )
    for part, name in listing.part_names.items():
        if strangers := sorted({entry.label for entry in entries if entry.part == part} - set(classes)):
            raise ValueError(
                f"classes {', '.join(strangers)} are in '{path}' under {name}/ but not under train/; add training "
                "images or remove them"
            )
    return classes


# What pixels mean


def _scale_all(path: Path, decoded: Sequence[Decoded], how: Decoding, log: logging.Logger) -> list[np.ndarray]:
    """All images as uint8, scaled as the setting says and never clipped."""
    kinds: dict[str, list[Decoded]] = {}
    for one in decoded:
        kinds.setdefault(one.depth.name, []).append(one)
    if how.value_range == "type":
        for several in kinds.values():
            _check_type(path, several)
        spans = {name: several[0].depth.span for name, several in kinds.items()}
    else:
        spans = dict.fromkeys(kinds, _common_span(path, kinds, how.value_range))
    for name, span in spans.items():
        if span is not None and (name != EIGHT_BITS.name or how.value_range != "type"):
            of = "the range of their type" if how.value_range == "type" else "by `value_range`"
            log.info("%d images of %s are scaled from %g (black) to %g (white), %s", len(kinds[name]), name, *span, of)
    images = []
    for one in decoded:
        span = spans[one.depth.name]
        images.append(
            one.values if span is None or not one.raw else to_bytes(one.values, span, one.depth, how.channels)
        )
    return images


def _found(several: Sequence[Decoded]) -> tuple[float, float]:
    return min(one.found[0] for one in several), max(one.found[1] for one in several)


def _check_type(path: Path, several: Sequence[Decoded]) -> None:
    """Refuse to scale by the range of the type where there is none, or where values lie beyond it or far below.

    Raises:
        ValueError: With the range that was found.
    """
    depth, (low, high) = several[0].depth, _found(several)
    if depth is EIGHT_BITS:
        return
    head = f"{len(several)} images of {depth.name} in '{path}' have values from {low:g} to {high:g}"
    remedy = "give the dataset `value_range: [black, white]`, or `value_range: data` for the values found"
    if depth.span is None:
        raise ValueError(f"{head}, and their type does not say what is black and what is white; {remedy}")
    black, white = depth.span
    if low < black or high > white:
        raise ValueError(f"{head}, expected {black:g} to {white:g}; {remedy}")
    if 0 < high < white / 2:
        bits = f" (as of {int(high).bit_length()} bits)" if depth.span[1] > 1 and depth.grey else ""
        if not depth.grey:
            remedy = "Pillow reads the upper 8 of 16 bits of colour only, so save the images with 8 bits"
        raise ValueError(
            f"{head}{bits}, less than half of what the type can hold (up to {white:g}), so that few of 256 levels "
            f"would be left; {remedy}"
            + (f", or `value_range: [{black:g}, {white:g}]` to keep them dark" if depth.grey else "")
        )


def _common_span(
    path: Path, kinds: dict[str, list[Decoded]], value_range: str | tuple[float, float]
) -> tuple[float, float]:
    """The one range that all images are scaled by.

    Raises:
        ValueError: Images are of several types, or have values beyond the range, or only one.
    """
    if len(kinds) > 1:
        counts = ", ".join(f"{len(several)} of {name}" for name, several in kinds.items())
        raise ValueError(
            f"expected images of one type in '{path}' to scale by one `value_range`, found {counts}; save them alike, "
            "or use `value_range: type`"
        )
    ((name, several),) = kinds.items()
    low, high = _found(several)
    if not several[0].depth.grey:
        raise ValueError(
            f"images of {name} in '{path}' are read with 8 of their 16 bits, which `value_range` cannot be applied to; "
            "use `value_range: type`, or save them with 8 bits"
        )
    if isinstance(value_range, str):
        if low == high:
            raise ValueError(f"all pixels in '{path}' have the value {low:g}; `value_range: data` cannot scale them")
        return low, high
    if low < value_range[0] or high > value_range[1]:
        raise ValueError(
            f"images in '{path}' have values from {low:g} to {high:g}, beyond `value_range` "
            f"{list(value_range)}; widen it"
        )
    return value_range


# What is said


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:N_NAMED])}{', …' if len(names) > N_NAMED else ''}"


def _tell_files(listing: Listing, entries: Sequence[Entry], tested: set[str], log: logging.Logger) -> None:
    names, counts = listing.part_names, Counter(entry.part for entry in entries)
    if listing.root:
        log.info("images lie in '%s'", "/".join(listing.root))
    if "val" in tested and counts["val"]:
        log.info("%d images under %s/ are taken as test images: there is no test/", counts["val"], names["val"])
    elif counts["val"]:
        log.info(
            "%d images under %s/ are divided like those under %s/: test images are those under %s/",
            counts["val"],
            names["val"],
            names["train"],
            names["test"],
        )
    if listing.skipped:
        n = sum(map(len, listing.skipped.values()))
        kinds = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(listing.skipped.items()))
        examples = [files[0] for _, files in sorted(listing.skipped.items())]
        log.info("%d files are no images and were skipped: %s (%s)", n, kinds, _some(examples))
    if listing.outside or listing.beside:
        what = [*listing.outside, *(f"{name}/" for name in sorted(listing.beside))]
        log.info("left out, for it is not under train/<class>/ or test/<class>/: %s", _some(what))


def _tell_images(decoded: Sequence[Decoded], entries: Sequence[Entry], how: Decoding, log: logging.Logger) -> None:
    def those(remark: str) -> list[str]:
        pairs = zip(entries, decoded, strict=True)
        return ["/".join(entry.parts) for entry, one in pairs if remark in one.remarks]

    if tagged := those(TAGGED):
        if how.orientation == "apply":
            log.info("%d images were turned as their orientation tag says (%s)", len(tagged), _some(tagged))
        else:
            log.warning(
                "%d images have an orientation tag and are read as they are stored, as torchvision does, which can be "
                "sideways (%s); `orientation: apply` turns them",
                len(tagged),
                _some(tagged),
            )
    if transparent := those(TRANSPARENT):
        log.info("%d images have transparency, which is dropped (%s)", len(transparent), _some(transparent))
    if frames := those(FRAMES):
        log.info("%d files hold several frames, of which the first is read (%s)", len(frames), _some(frames))


def _tell_classes(classes: Sequence[str], entries: Sequence[Entry], tested: set[str], log: logging.Logger) -> None:
    shown = [f"{i} = {label}" for i, label in enumerate(classes)]
    numbers = all(label.isdecimal() for label in classes)
    odd = numbers and list(classes) != sorted(classes, key=int)
    log.info("%d classes, sorted as text: %s", len(classes), ", ".join([*shown[:10], *(["…"] if shown[10:] else [])]))
    if odd:
        log.warning("the names of the classes are numbers but sorted as text, as torchvision does: 10 comes before 2")
    seen = {entry.label for entry in entries if entry.part in tested}
    if seen and (unseen := [label for label in classes if label not in seen]):
        log.warning("classes without test images: %s", _some(unseen))
