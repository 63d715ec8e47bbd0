"""What people bring as data, a row a situation: what lies there, and what comes out or what is said."""

import io
import logging
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.datasets import ImageSet, check_augmentation
from paretoprune.data.normalisations import NORMALISATIONS, normalisation_of
from paretoprune.data.reading import OWN_SOURCES, read_images
from paretoprune.data.splits import LabelledImages, channel_statistics, normalise
from paretoprune.workflow.sections import OWN_KEYS
from PIL import Image, TiffImagePlugin
from safetensors.torch import save_file
from torchvision.transforms import v2

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
RAMP = np.arange(64, dtype=np.int64).reshape(8, 8)


def read(root: Path, name: str = ".", source: str = "imagefolder", **settings: Any) -> ImageSet:
    return read_images(source, root, path=name, **settings)


def put(root: Path, name: str, image: Image.Image | np.ndarray | bytes = COLOUR, **options: Any) -> Path:
    """A file below a folder: an image, or bytes."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def two_classes(root: Path, *names: str) -> Path:
    """A training image of each of two classes, and images of other names."""
    for name in ("train/ant/0.png", "train/bee/0.png", *names):
        put(root, name)
    return root


def png(array: np.ndarray = COLOUR) -> bytes:
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


# Pixels: a file of 64 or 256 levels, and the grey values that it is read with


def as_12_bits_in_16(root: Path) -> None:
    put(root, "train/a/0.png", (RAMP * 65).astype(np.uint16))


def as_int32(root: Path) -> None:
    put(root, "train/a/0.tif", (RAMP * 1000).astype(np.int32))


def as_high_int32(root: Path) -> None:
    put(root, "train/a/0.tif", (RAMP + 2_000_000_000).astype(np.int32))


def as_float(root: Path) -> None:
    put(root, "train/a/0.tif", (RAMP / 63).astype(np.float32))


def as_float_to_255(root: Path) -> None:
    put(root, "train/a/0.tif", (RAMP * 4).astype(np.float32))


def as_float_below_zero(root: Path) -> None:
    put(root, "train/a/0.tif", (RAMP - 10).astype(np.float32))


def as_16_bits(root: Path) -> None:
    put(root, "train/a/0.png", (RAMP * 1040).astype(np.uint16))


def as_16_bits_tiff(root: Path) -> None:
    put(root, "train/a/0.tif", (RAMP * 1040).astype(np.uint16))


def as_16_bits_big_endian(root: Path) -> None:
    put(root, "train/a/0.tif", Image.fromarray((RAMP * 1040).astype(">u2")))


def as_pgm_of_12_bits(root: Path) -> None:
    put(root, "train/a/0.pgm", b"P5 8 8 4095\n" + (RAMP * 65).astype(">u2").tobytes())


def as_16_bits_white_is_zero(root: Path) -> None:
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    path = put(root, "train/a/0.tif", (RAMP[::-1, ::-1] * 1040).astype(np.uint16), tiffinfo=ifd)
    # Pillow writes that black is 0; the tag 262 (photometric interpretation) follows its number, type and count.
    content = path.read_bytes()
    tag = b"\x06\x01\x03\x00\x01\x00\x00\x00"
    assert content.count(tag + b"\x01\x00") == 1
    path.write_bytes(content.replace(tag + b"\x01\x00", tag + b"\x00\x00"))


EVEN = np.rint(RAMP * 255 / 63)
PIXELS: list[tuple[Callable[[Path], None], dict[str, Any], np.ndarray | str]] = [
    (as_16_bits, {}, np.rint(RAMP * 1040 * 255 / 65535)),
    (as_16_bits_tiff, {}, np.rint(RAMP * 1040 * 255 / 65535)),
    (as_16_bits_big_endian, {}, np.rint(RAMP * 1040 * 255 / 65535)),
    (as_16_bits_white_is_zero, {}, np.rint(255 - RAMP[::-1, ::-1] * 1040 * 255 / 65535)),
    (as_pgm_of_12_bits, {}, np.rint(RAMP * 65 * 255 / 4095)),
    (as_12_bits_in_16, {"value_range": "data"}, EVEN),
    (as_12_bits_in_16, {"value_range": (0, 4095)}, EVEN),
    (as_12_bits_in_16, {"value_range": [0, 65535]}, np.rint(RAMP * 65 * 255 / 65535)),
    (as_12_bits_in_16, {}, r"16 bits .* from 0 to 4095 \(as of 12 bits\).*value_range: \[black, white\]"),
    (as_12_bits_in_16, {"value_range": (0, 4000)}, r"from 0 to 4095, beyond `value_range` \[0, 4000\]; widen"),
    (as_int32, {}, r"32-bit integers .* from 0 to 63000, and their type does not say.*value_range"),
    (as_int32, {"value_range": "data"}, EVEN),
    (as_int32, {"value_range": (0, 126_000)}, np.rint(RAMP * 1000 * 255 / 126_000)),
    (as_high_int32, {"value_range": "data"}, EVEN),
    (as_float, {}, EVEN),
    (as_float, {"value_range": "data"}, EVEN),
    (as_float_to_255, {}, r"32-bit float .* from 0 to 252, expected 0 to 1; give the dataset `value_range"),
    (as_float_to_255, {"value_range": (0, 255)}, RAMP * 4),
    (as_float_below_zero, {}, r"from -10 to 53, expected 0 to 1"),
    (as_float_below_zero, {"value_range": "data"}, EVEN),
]


@pytest.mark.parametrize(("write", "settings", "expected"), PIXELS, ids=lambda one: getattr(one, "__name__", None))
def test_deep_pixels_are_scaled_and_never_clipped_or_refused(
    tmp_path: Path, write: Callable[[Path], None], settings: dict[str, Any], expected: np.ndarray | str
) -> None:
    write(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(tmp_path, channels=1, **settings)
        return
    grey = read(tmp_path, channels=1, **settings).images[0, 0]
    assert grey.dtype == torch.uint8
    np.testing.assert_array_equal(grey.numpy(), expected)
    colour = read(tmp_path, channels=3, **settings).images[0]
    assert all(torch.equal(channel, grey) for channel in colour)


def test_deep_images_are_brought_to_a_size_like_others(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    put(tmp_path, "deep/train/a/0.png", grey.astype(np.uint16) * 257)
    put(tmp_path, "deep/train/b/0.tif", grey.astype(np.float32) / 255)
    put(tmp_path, "eight/train/a/0.png", grey)
    deep = read(tmp_path, "deep", channels=1, image_size=8, resize=12).images.int()
    eight = read(tmp_path, "eight", channels=1, image_size=8, resize=12).images.int()
    # The same interpolation, rounded once instead of after each direction.
    assert (deep - eight).abs().max() <= 1


def test_images_of_several_types_are_each_scaled_by_their_own_range_and_never_by_one(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.png", np.full((4, 4), 51, dtype=np.uint8))
    put(tmp_path, "train/a/1.png", np.full((4, 4), 65535, dtype=np.uint16))
    put(tmp_path, "train/b/2.tif", np.full((4, 4), 0.6, dtype=np.float32))
    assert read(tmp_path, channels=1).images[:, 0, 0, 0].tolist() == [51, 255, 153]
    with pytest.raises(ValueError, match=r"of one type .* found 1 of 8 bits, 1 of 16 bits, 1 of 32-bit float; save"):
        read(tmp_path, channels=1, value_range="data")


def test_a_value_that_is_not_finite_names_its_file(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.tif", np.array([[0, np.nan], [np.inf, 1]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"train/a/0\.tif \(2 pixels that are not finite\)"):
        read(tmp_path)


def test_colour_of_16_bits_is_read_by_its_upper_8_unless_they_say_little(tmp_path: Path) -> None:
    def ppm(values: np.ndarray) -> bytes:
        return b"P6 8 8 65535\n" + np.repeat(values.astype(">u2")[..., None], 3, axis=2).tobytes()

    put(tmp_path, "bright/train/a/0.ppm", ppm(RAMP * 1040))
    found = read(tmp_path, "bright").images[0].float()
    np.testing.assert_allclose(found[0].numpy(), RAMP * 1040 * 255 / 65535, rtol=0, atol=1)


@pytest.mark.parametrize("white", [4095, 65535])
def test_png_of_16_bits_in_colour_is_refused_where_its_upper_bits_are_empty(tmp_path: Path, white: int) -> None:
    put(tmp_path, "train/a/0.png", colour_png(np.rint(RAMP / 63 * white).astype(np.uint16)))
    if white == 65535:
        np.testing.assert_allclose(read(tmp_path).images[0, 0].numpy(), RAMP / 63 * 255, rtol=0, atol=1)
        with pytest.raises(ValueError, match="read with 8 of their 16 bits, which `value_range` cannot"):
            read(tmp_path, value_range="data")
    else:
        with pytest.raises(ValueError, match=r"16-bit colour .* less than half .* save the images with 8 bits"):
            read(tmp_path)


def colour_png(grey: np.ndarray) -> bytes:
    """A PNG of three channels of 16 bits, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = [b"\0" + np.repeat(row.astype(">u2")[:, None], 3, axis=1).tobytes() for row in grey]
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(COLOUR).convert(mode[:-1])
    image.putalpha(Image.fromarray(COLOUR[..., 1]))
    assert image.mode == mode
    return image


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(COLOUR // 128 * 255).quantize(8)
    if transparent:
        image.info["transparency"] = bytes([0, 128, 255, 255, 255, 255, 255, 255])
    return image


MODES: list[tuple[str, Image.Image, np.ndarray]] = [
    ("1 bit", Image.fromarray(RAMP % 2 == 1), np.repeat((RAMP % 2 * 255)[..., None], 3, axis=2)),
    ("palette", palette(False), COLOUR // 128 * 255),
    ("palette with transparency", palette(True), COLOUR // 128 * 255),
    ("RGBA", with_alpha("RGBA"), COLOUR),
    ("LA", with_alpha("LA"), np.repeat(np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None], 3, axis=2)),
    ("CMYK", Image.fromarray(COLOUR).convert("CMYK"), COLOUR),
]


@pytest.mark.parametrize(("image", "expected"), [row[1:] for row in MODES], ids=[row[0] for row in MODES])
def test_other_modes_have_the_colours_that_one_sees(tmp_path: Path, image: Image.Image, expected: np.ndarray) -> None:
    put(tmp_path, f"train/a/0.{'tif' if image.mode == 'CMYK' else 'png'}", image)
    colour = read(tmp_path).images[0]
    np.testing.assert_array_equal(colour.permute(1, 2, 0).numpy(), expected)
    grey = np.asarray(Image.fromarray(expected.astype(np.uint8)).convert("L"))
    np.testing.assert_array_equal(read(tmp_path, channels=1).images[0, 0].numpy(), grey)


def test_dropped_transparency_and_further_frames_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train/a/0.png", with_alpha("RGBA"))
    frames = [Image.fromarray(COLOUR[::step]) for step in (1, -1)]
    put(tmp_path, "train/a/1.tif", frames[0], save_all=True, append_images=frames[1:])
    said = listen(caplog, tmp_path)
    assert "1 images have transparency, which is dropped (train/a/0.png)" in said
    assert "1 files hold several frames, of which the first is read (train/a/1.tif)" in said
    np.testing.assert_array_equal(read(tmp_path).images[1].permute(1, 2, 0).numpy(), COLOUR)


def listen(
    caplog: pytest.LogCaptureFixture, root: Path, name: str = ".", source: str = "imagefolder", **settings: Any
) -> str:
    with caplog.at_level(logging.INFO, "paretoprune"):
        caplog.clear()
        read(root, name, source, log=logging.getLogger("paretoprune"), **settings)
    return "\n".join(record.getMessage() for record in caplog.records)


# Orientation


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_images_with_an_orientation_tag_are_kept_and_named_or_turned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tag: int, ending: str
) -> None:
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :4], upright[8:, 12:] = 255, 128  # no symmetry
    # How a camera stores it: turned by the inverse of what the tag asks for.
    turns: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, 1),
        lambda a: np.rot90(a, 2).swapaxes(0, 1),
        lambda a: np.rot90(a, 3),
    ]
    stored = np.ascontiguousarray(turns[tag - 1](upright))
    exif = Image.Exif()
    exif[0x0112] = tag
    put(tmp_path, f"train/a/0.{ending}", stored, exif=exif, **({"quality": 100} if ending == "jpg" else {}))
    kept, turned = (read(tmp_path, orientation=one).images[0].permute(1, 2, 0).numpy() for one in ("keep", "apply"))
    np.testing.assert_allclose(kept.astype(int), stored, rtol=0, atol=3)
    np.testing.assert_allclose(turned.astype(int), upright, rtol=0, atol=3)
    assert np.array_equal(read(tmp_path).images[0].permute(1, 2, 0).numpy(), kept)  # as torchvision's loader
    assert ("1 images have an orientation tag" in listen(caplog, tmp_path)) == (tag != 1)
    assert ("1 images were turned" in listen(caplog, tmp_path, orientation="apply")) == (tag != 1)


# Which files, and which folders

SKIPPED = [
    ("train/ant/Thumbs.db", "1 .db"),
    ("train/ant/labels.csv", "1 .csv"),
    ("train/ant/notes.TXT", "1 .txt"),
    ("train/ant/.DS_Store", "1 hidden"),
    ("train/ant/._0.png", "1 hidden"),
    ("train/.cache/0.png", "1 hidden"),
    ("train/ant/@eaDir/0.png", "1 hidden"),
    ("train/ant/README", "1 without an ending"),
    ("train/notes.txt", "1 .txt"),
]


def pack_tar(root: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for file in sorted(root.rglob("*")):
            tar.add(file, file.relative_to(root).as_posix(), recursive=False)


def pack_tar_from_inside(root: Path, archive: Path) -> None:
    """As `tar -cf archive .` packs a folder: the first member is `./`."""
    with tarfile.open(archive, "w") as tar:
        tar.add(root, "./")


def pack_zip(root: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(root.rglob("*"), reverse=True):
            packed.write(file, file.relative_to(root).as_posix())


PACKED: list[tuple[str, Callable[[Path, Path], None] | None]] = [
    ("tree", None),
    ("a.tar", pack_tar),
    ("b.tar", pack_tar_from_inside),
    ("a.zip", pack_zip),
]


@pytest.mark.parametrize(("name", "pack"), PACKED, ids=[name for name, _ in PACKED])
@pytest.mark.parametrize(("file", "said"), SKIPPED)
def test_files_that_are_no_images_are_skipped_and_counted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    said: str,
    name: str,
    pack: Callable[[Path, Path], None] | None,
) -> None:
    root = two_classes(tmp_path / "tree")
    put(root, file, b"no image")
    if pack:
        pack(root, tmp_path / name)
    assert len(read(tmp_path, name).images) == 2
    assert f"1 files are no images and were skipped: {said} ({file})" in listen(caplog, tmp_path, name)


BROKEN = [
    ("empty.png", b"", "empty"),
    ("pointer.png", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; run `git lfs pull`"),
    ("page.jpg", b"\n<!DOCTYPE html><html>404", "a web page; download the image again"),
    ("cut.png", png()[:60], ""),
    ("text.JPG", b"no image", "cannot identify"),
    ("phone.HEIC", b"....ftypheic", r"Pillow does not read \.heic; convert it"),
    ("odd.tif", b"II*\0", ""),
]


@pytest.mark.parametrize(("name", "pack"), PACKED, ids=[name for name, _ in PACKED])
@pytest.mark.parametrize(("file", "content", "reason"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_image_is_an_error_that_names_it(
    tmp_path: Path, file: str, content: bytes, reason: str, name: str, pack: Callable[[Path, Path], None] | None
) -> None:
    root = two_classes(tmp_path / "tree")
    put(root, f"train/ant/{file}", content)
    if pack:
        pack(root, tmp_path / name)
    with pytest.raises(ValueError, match=rf"1 files in .* no readable images: train/ant/{file} \(.*{reason}.*repair"):
        read(tmp_path, name)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val", "TEST"])
def test_images_beside_train_are_test_images_whatever_their_folder_is_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    found = read(two_classes(tmp_path, f"{name}/bee/1.png"))
    assert found.is_test.tolist() == [entry.startswith(name) for entry in sorted(["train", "train", f"{name}/"])]
    assert int(found.is_test.sum()) == 1
    assert int(found.labels[found.is_test]) == 1
    said = listen(caplog, tmp_path)
    assert (f"1 images under {name}/ are taken as test images" in said) == name.lower().startswith("val")
    assert "classes without test images: ant" in said


def test_images_under_val_are_divided_like_others_where_there_is_a_test_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read(two_classes(tmp_path, "val/bee/1.png", "test/ant/2.png"))
    assert found.is_test.tolist() == [True, False, False, False]
    assert found.labels.tolist() == [0, 0, 1, 1]
    said = listen(caplog, tmp_path)
    assert "1 images under val/ are divided like those under train/: test images are those under test/" in said


NAMES = [
    ("in a sub-folder", "train/ant/sub/deeper/1.png"),
    ("upper-case ending", "train/ant/1.PNG"),
    ("spaces", "train/ant/a b c.png"),
    ("non-ASCII", "train/ant/été 昆虫.png"),
    ("without an ending", "train/ant/00001"),
    ("several dots", "train/ant/1.of.2.png"),
]


@pytest.mark.parametrize(("name", "pack"), PACKED, ids=[name for name, _ in PACKED])
@pytest.mark.parametrize("file", [row[1] for row in NAMES], ids=[row[0] for row in NAMES])
def test_images_are_found_wherever_they_lie_in_a_class(
    tmp_path: Path, file: str, name: str, pack: Callable[[Path, Path], None] | None
) -> None:
    root = two_classes(tmp_path / "tree")
    other = np.ascontiguousarray(COLOUR[::-1])
    put(root, file, png(other))
    if pack:
        pack(root, tmp_path / name)
    found = read(tmp_path, name)
    assert found.labels.tolist() == [0, 0, 1]
    assert sum(np.array_equal(image.permute(1, 2, 0).numpy(), other) for image in found.images) == 1


@pytest.mark.parametrize(("name", "pack"), PACKED, ids=[name for name, _ in PACKED])
@pytest.mark.parametrize("wrapping", ["outer", "my data", "train", "a/b"])
def test_folders_around_train_do_not_matter(
    tmp_path: Path, wrapping: str, name: str, pack: Callable[[Path, Path], None] | None
) -> None:
    root = tmp_path / "tree"
    two_classes(root / wrapping, "val/ant/1.png")
    put(root, "README.md", b"about")
    put(root, "__MACOSX/._x.png", b"left behind")
    if pack:
        pack(root, tmp_path / name)
    found = read(tmp_path, name)
    assert found.classes == ("ant", "bee")
    assert int(found.is_test.sum()) == 1
    assert len(found.images) == 3


def test_names_with_accents_are_one_class_however_a_system_writes_them(tmp_path: Path) -> None:
    two_classes(tmp_path)
    put(tmp_path, f"train/{unicodedata.normalize('NFC', 'café')}/0.png")
    put(tmp_path, f"test/{unicodedata.normalize('NFD', 'café')}/0.png")
    assert read(tmp_path).classes == ("ant", "bee", "café")


def test_classes_are_numbered_as_text_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in ("2", "10", "1"):
        put(tmp_path, f"train/{label}/0.png")
    assert read(tmp_path).classes == ("1", "10", "2")
    said = listen(caplog, tmp_path)
    assert "3 classes, sorted as text: 0 = 1, 1 = 10, 2 = 2" in said
    assert "10 comes before 2" in said


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: (root / "train" / "cat").mkdir(), "classes cat in .* have a folder under train/ but no images"),
        (lambda root: put(root, "train/cat/x.txt", b"-"), "classes cat in .* have a folder under train/ but no images"),
        (lambda root: put(root, "test/cat/0.png"), "classes cat are in .* under test/ but not under train/"),
        (lambda root: put(root, "val/cat/0.png"), "classes cat are in .* under val/ but not under train/"),
    ],
)
@pytest.mark.parametrize(("name", "pack"), PACKED, ids=[name for name, _ in PACKED])
def test_a_class_without_training_images_is_named(
    tmp_path: Path,
    write: Callable[[Path], None],
    message: str,
    name: str,
    pack: Callable[[Path, Path], None] | None,
) -> None:
    root = two_classes(tmp_path / "tree")
    write(root)
    if pack:
        pack(root, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name)


def test_images_outside_a_class_and_folders_beside_the_parts_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_classes(tmp_path, "train/loose.png", "extra/bee/0.png")
    assert len(read(tmp_path).images) == 2
    said = listen(caplog, tmp_path)
    assert "left out" in said
    assert "train/loose.png" in said
    assert "extra/" in said


@pytest.mark.parametrize("name", ["a.7z", "a.tar.zst", "a.png", "a.csv"])
def test_another_kind_of_file_is_answered_with_those_that_can_be_read(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, b"7z\xbc\xaf something else" if name != "a.png" else COLOUR)
    with pytest.raises(ValueError, match=r"give another `path`: a directory, a tar archive .* or a zip archive"):
        read(tmp_path, name)


def test_what_was_skipped_is_named_where_no_image_is_left(tmp_path: Path) -> None:
    put(tmp_path, "train/ant/0.npy", b"-")
    put(tmp_path, "train/bee/0.npy", b"-")
    with pytest.raises(ValueError, match=r"found none; arrange them so \(there is: 2 \.npy\)"):
        read(tmp_path)


def test_what_is_there_is_named_where_train_is_not(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png")
    put(tmp_path, "dog/0.png")
    with pytest.raises(ValueError, match=r"as train/<class>/<image>, found none; arrange them so \(there is: cat, dog"):
        read(tmp_path)


# Links


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    root, elsewhere = two_classes(tmp_path / "tree"), tmp_path / "elsewhere"
    put(elsewhere, "x/1.png")
    (root / "train" / "ant" / "link.png").symlink_to(elsewhere / "x" / "1.png")
    (root / "train" / "cat").symlink_to(elsewhere / "x")
    found = read(root)
    assert found.classes == ("ant", "bee", "cat")
    assert found.labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("place", ["train/ant/1.png", "train/cat"])
def test_a_link_to_nothing_is_named(tmp_path: Path, place: str) -> None:
    root = two_classes(tmp_path)
    (root / place).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"{place} \(a link to '.*gone', where nothing is\)"):
        read(root)


def test_a_link_that_leads_back_is_named(tmp_path: Path) -> None:
    root = two_classes(tmp_path)
    (root / "train" / "ant" / "again").symlink_to(root / "train")
    with pytest.raises(ValueError, match=r"the link '.*again' leads back to a folder that it lies in; remove it"):
        read(root)


def test_links_inside_a_tar_archive_are_followed_and_others_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, target, kind in (
            ("train/a/0.png", None, tarfile.REGTYPE),
            ("train/b/0.png", "train/a/0.png", tarfile.LNKTYPE),
            ("train/b/1.png", "../a/0.png", tarfile.SYMTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target or ""
            member.size = 0 if target else len(png())
            tar.addfile(member, None if target else io.BytesIO(png()))
    assert read(tmp_path, "a.tar").labels.tolist() == [0, 1, 1]
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo("train/a/passwd.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"train/a/passwd\.png \(a link to '/etc/passwd', which is no file in the arc"):
        read(tmp_path, "a.tar")


def test_a_member_that_was_added_to_a_tar_archive_again_replaces_the_first(tmp_path: Path) -> None:
    pack_tar(two_classes(tmp_path / "tree"), tmp_path / "a.tar")
    put(tmp_path, "new.png", np.zeros((6, 8, 3), dtype=np.uint8))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.add(tmp_path / "new.png", "train/ant/0.png")
    found = read(tmp_path, "a.tar")
    assert found.labels.tolist() == [1, 0]
    assert found.images.amax(dim=(1, 2, 3)).tolist() == [int(COLOUR.max()), 0]


@pytest.mark.parametrize("settings", [{}, {"value_range": (0, 255)}])
def test_8_bits_are_left_as_they_are_or_scaled_by_a_range_that_is_given(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    put(tmp_path, "train/a/0.png", COLOUR // 2 + 10)
    assert np.array_equal(read(tmp_path, **settings).images[0].permute(1, 2, 0).numpy(), COLOUR // 2 + 10)
    wide = read(tmp_path, value_range=(10, 137)).images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(wide, np.rint((COLOUR // 2).astype(np.float64) * 255 / 127))
    by_data = read(tmp_path, value_range="data").images[0]
    assert (int(by_data.min()), int(by_data.max())) == (0, 255)
    with pytest.raises(ValueError, match="widen it"):
        read(tmp_path, value_range=(20, 200))


# Zip archives


def test_nothing_is_unpacked_from_a_zip_archive(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "tree")
    pack_zip(root, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as packed:
        packed.writestr("../../train/ant/evil.png", png())
        packed.writestr("/train/ant/root.png", png())
        packed.writestr("train\\bee\\windows.png", png())
    before = sorted(tmp_path.rglob("*"))
    assert read(tmp_path, "a.zip").labels.tolist() == [0, 0, 0, 1, 1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["cut", "overwritten", "no archive"])
def test_a_damaged_zip_archive_is_named(tmp_path: Path, damage: str) -> None:
    pack_zip(two_classes(tmp_path / "tree"), tmp_path / "a.zip")
    whole = (tmp_path / "a.zip").read_bytes()
    content = {"cut": whole[:300], "overwritten": whole[:100] + b"\x55" * 60 + whole[160:], "no archive": b"no"}[damage]
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a directory or a zip archive at '.*a\.zip', but: .*; give another `path`"):
        read(tmp_path, "a.zip")


# Sizes


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (37, 91), (33, 33), (24, 24), (23, 31), (100, 16)])
@pytest.mark.parametrize(("resize", "image_size"), [(24, 16), (16, 16), (19, 16), (40, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_and_image_size_are_those_of_torchvision_to_the_pixel(
    tmp_path: Path, size: tuple[int, int], resize: int, image_size: int, channels: int
) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    put(tmp_path, "train/a/0.png", image)
    found = read(tmp_path, resize=resize, image_size=image_size, channels=channels).images[0]
    theirs = v2.Compose([v2.Resize(resize), v2.CenterCrop(image_size), v2.PILToTensor()])
    assert torch.equal(found, theirs(image.convert("RGB" if channels == 3 else "L")))


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"resize": 24}, "expected `resize` beside an `image_size` that is no larger, found resize 24 and image_size None"),
    ({"resize": 24, "image_size": 32}, "found resize 24 and image_size 32"),
    ({"orientation": "upright"}, "expected orientation keep or apply, found 'upright'"),
    ({"value_range": "auto"}, "expected value_range `type`, `data` or two growing numbers, .* found 'auto'"),
    ({"value_range": [255, 0]}, r"found \[255, 0\]"),
    ({"value_range": [0, 1, 2]}, r"found \[0, 1, 2\]"),
    ({"layout": "grey"}, "source 'imagefolder' cannot be read with .*layout"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "nothing", **settings)


def test_the_configuration_knows_the_settings_of_each_source() -> None:
    assert {name: set(keys) for name, keys in OWN_KEYS.items()} == {
        name: set(kind.__dataclass_fields__) for name, (kind, _) in OWN_SOURCES.items()
    }


def test_settings_do_not_fit_sets_that_are_known() -> None:
    with pytest.raises(ValueError, match="path, channels do not fit source 'digits'; remove them"):
        read_images("digits", Path(), path="x", channels=1)


# Arrays

N = 12
LABELS = np.arange(N) % 3
TABLE = RNG.normal(size=(N, 5)).astype(np.float32)
SIGNALS = RNG.normal(size=(N, 2, 9)).astype(np.float32)
PICTURES = RNG.integers(0, 256, (N, 3, 6, 7), dtype=np.uint8)


def save(root: Path, arrays: dict[str, Any], source: str) -> str:
    """Write arrays to a file of a source; its name."""
    if source == "npz":
        np.savez(root / "a.npz", **arrays)
    else:
        # A copy: a view would be saved in another order.
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array).copy()) for name, array in arrays.items()}
        save_file(tensors, root / "a.safetensors")
    return f"a.{source}"


def read_arrays(root: Path, arrays: dict[str, Any], source: str = "npz", **settings: Any) -> ImageSet:
    return read(root, save(root, arrays, source), source, **settings)


INPUTS: list[tuple[str, np.ndarray, dict[str, Any], np.ndarray]] = [
    ("table", TABLE, {}, TABLE),
    ("table of float64", TABLE.astype(np.float64), {}, TABLE),
    ("table of whole numbers", (TABLE * 9).astype(np.int64), {}, (TABLE * 9).astype(np.int64).astype(np.float32)),
    ("table of flags", TABLE > 0, {}, (TABLE > 0).astype(np.float32)),
    ("signals", SIGNALS, {}, SIGNALS),
    ("signals, channels last", SIGNALS.swapaxes(1, 2), {"layout": "channels_last"}, SIGNALS),
    ("signals of 8 bits", PICTURES[:, 0], {"layout": "channels_first"}, PICTURES[:, 0].astype(np.float32)),
    ("images", PICTURES, {}, PICTURES),
    ("images, channels last", np.moveaxis(PICTURES, 1, 3), {}, PICTURES),
    ("images of 3 by 3", PICTURES[:, :, :3, :3], {"layout": "channels_first"}, PICTURES[:, :, :3, :3]),
    ("grey images", PICTURES[:, 0], {"layout": "grey"}, PICTURES[:, :1]),
    ("float images", PICTURES / 255, {}, (PICTURES / 255).astype(np.float32)),
    ("normalised images", PICTURES / 64 - 2, {}, (PICTURES / 64 - 2).astype(np.float32)),
    ("images of 16 bits", PICTURES.astype(np.uint16) * 257, {}, (PICTURES / 255).astype(np.float32)),
    ("float images to 255", PICTURES * 1.0, {"value_range": [0, 255]}, (PICTURES / 255).astype(np.float32)),
    ("int64 images", PICTURES.astype(np.int64), {"value_range": [0, 255]}, (PICTURES / 255).astype(np.float32)),
    (
        "images by their values",
        PICTURES.astype(np.int32) * 5 - 7,
        {"value_range": "data"},
        ((PICTURES - float(PICTURES.min())) / float(np.ptp(PICTURES))).astype(np.float32),
    ),
]


@pytest.mark.parametrize("source", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("values", "settings", "expected"), [row[1:] for row in INPUTS], ids=[row[0] for row in INPUTS]
)
def test_arrays_are_tables_signals_and_images(
    tmp_path: Path, source: str, values: np.ndarray, settings: dict[str, Any], expected: np.ndarray
) -> None:
    found = read_arrays(tmp_path, {"images": values, "labels": LABELS}, source, **settings)
    assert found.images.numpy().dtype == expected.dtype
    np.testing.assert_allclose(found.images.numpy(), expected, rtol=0, atol=0 if expected.dtype == np.uint8 else 1e-6)
    assert found.images.is_contiguous()
    assert found.labels.tolist() == LABELS.tolist()
    assert found.classes == ("0", "1", "2")
    found.save(tmp_path / "again.safetensors")
    again = ImageSet.load(tmp_path / "again.safetensors")
    assert torch.equal(again.images, found.images)


ONE_HOT = np.eye(3)[LABELS]
LABELLINGS: list[tuple[str, np.ndarray, tuple[str, ...]]] = [
    ("bytes", LABELS.astype(np.uint8), ("0", "1", "2")),
    ("one a row", LABELS[:, None], ("0", "1", "2")),
    ("one-hot", ONE_HOT, ("0", "1", "2")),
    ("one-hot flags", ONE_HOT.astype(bool), ("0", "1", "2")),
    ("whole floats", LABELS.astype(np.float32), ("0", "1", "2")),
    ("from 1", LABELS + 1, ("1", "2", "3")),
    ("with gaps", LABELS * 10, ("0", "10", "20")),
    ("names", np.array(["ant", "bee", "cat"])[LABELS], ("ant", "bee", "cat")),
]


@pytest.mark.parametrize(("labels", "classes"), [row[1:] for row in LABELLINGS], ids=[row[0] for row in LABELLINGS])
def test_labels_are_whole_numbers_names_or_rows_with_a_single_one(
    tmp_path: Path, labels: np.ndarray, classes: tuple[str, ...]
) -> None:
    found = read_arrays(tmp_path, {"images": TABLE, "labels": labels})
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == LABELS.tolist()
    assert found.classes == classes


def test_labels_of_two_signs_are_two_classes(tmp_path: Path) -> None:
    found = read_arrays(tmp_path, {"images": TABLE, "labels": np.where(LABELS == 1, 1, -1)})
    assert found.classes == ("-1", "1")
    assert found.labels.tolist() == (LABELS == 1).astype(int).tolist()


@pytest.mark.parametrize(
    ("names", "n_test"),
    [
        (("images", "labels"), 0),
        (("x", "y"), 0),
        (("X", "Y"), 0),
        (("data", "targets"), 0),
        (("features", "label"), 0),
        (("train_images", "train_labels", "test_images", "test_labels"), 4),
        (("x_train", "y_train", "x_test", "y_test"), 4),
        (("X_train", "y_train", "X_val", "y_val"), 4),
        (("images", "labels", "test_images", "test_labels"), 4),
    ],
)
def test_arrays_have_the_names_that_people_give_them(tmp_path: Path, names: tuple[str, ...], n_test: int) -> None:
    parts = [TABLE[: N - n_test], LABELS[: N - n_test], TABLE[N - n_test :], LABELS[N - n_test :]]
    found = read_arrays(tmp_path, dict(zip(names, parts, strict=False)))
    assert torch.equal(found.images, torch.from_numpy(TABLE))
    assert found.labels.tolist() == LABELS.tolist()
    assert found.is_test.tolist() == [False] * (N - n_test) + [True] * n_test


def test_val_is_divided_like_train_where_there_is_test(tmp_path: Path) -> None:
    arrays = {f"{part}_{what}": value[6:] for part in ("train", "val", "test") for what, value in PAIR.items()}
    assert read_arrays(tmp_path, arrays).is_test.tolist() == [False] * 12 + [True] * 6


PAIR: dict[str, np.ndarray] = {"images": TABLE, "labels": LABELS}


@pytest.mark.parametrize("flags", [np.arange(N) > 8, (np.arange(N) > 8).astype(np.int64)])
def test_is_test_sets_examples_apart_and_classes_names_them(tmp_path: Path, flags: np.ndarray) -> None:
    found = read_arrays(tmp_path, {**PAIR, "is_test": flags, "classes": np.array(["z", "y", "x"])})
    assert found.is_test.tolist() == [i > 8 for i in range(N)]
    assert found.classes == ("z", "y", "x")
    assert found.labels.tolist() == LABELS.tolist()


def said_of(caplog: pytest.LogCaptureFixture, root: Path, arrays: dict[str, Any], **settings: Any) -> str:
    return listen(caplog, root, save(root, arrays, "npz"), source="npz", **settings)


def test_numbers_as_text_and_dark_images_of_8_bits_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_text = {"images": TABLE, "labels": (LABELS + 9).astype(str)}
    assert "10 comes before 2; save whole numbers" in said_of(caplog, tmp_path, as_text)
    assert "10 comes" not in said_of(caplog, tmp_path, {"images": TABLE, "labels": LABELS.astype(str)})
    dark = {"images": PICTURES // 16, "labels": LABELS}
    assert "they are dark; give the dataset `value_range: [0, 15]`" in said_of(caplog, tmp_path, dark)
    assert "dark" not in said_of(caplog, tmp_path, dark, value_range=[0, 15])
    assert "dark" not in said_of(caplog, tmp_path, {"images": PICTURES, "labels": LABELS})


def test_names_of_classes_may_be_bytes(tmp_path: Path) -> None:
    assert read_arrays(tmp_path, {**PAIR, "classes": np.array([b"z", b"y", b"x"])}).classes == ("z", "y", "x")


def test_names_as_labels_take_the_order_of_classes(tmp_path: Path) -> None:
    names = np.array(["z", "y", "x"])
    found = read_arrays(tmp_path, {"images": TABLE, "labels": names[LABELS], "classes": names})
    assert (found.labels.tolist(), found.classes) == (LABELS.tolist(), ("z", "y", "x"))


def test_a_safetensors_file_can_name_its_classes_and_hold_half_precision(tmp_path: Path) -> None:
    tensors = {"images": torch.from_numpy(TABLE).bfloat16(), "labels": torch.from_numpy(LABELS)}
    save_file(tensors, tmp_path / "a.safetensors", {"classes": '["z", "y", "x"]'})
    found = read(tmp_path, "a.safetensors", "safetensors")
    assert found.classes == ("z", "y", "x")
    assert torch.equal(found.images, tensors["images"].float())


ODD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "no labels",
        {"images": TABLE},
        {},
        r"expected arrays images and labels .* found images \(train has images alone\)",
    ),
    ("other names", {"a": TABLE, "b": LABELS}, {}, "expected arrays images and labels .* found a, b; name them so"),
    ("two inputs", {**PAIR, "x": TABLE}, {}, "arrays 'images' and 'x' .* can both be the inputs of part train"),
    ("test alone", {"test_images": TABLE, "test_labels": LABELS}, {}, "expected arrays images and labels"),
    ("half a test part", {**PAIR, "test_images": TABLE}, {}, "test has test_images alone"),
    ("fewer labels", {"images": TABLE, "labels": LABELS[:-1]}, {}, "a label for each of the 12 examples .* found 11"),
    ("no numbers", {"images": TABLE.astype(str), "labels": LABELS}, {}, "expected numbers in 'images'"),
    ("not finite", {"images": np.where(TABLE > 1, np.nan, TABLE), "labels": LABELS}, {}, "'images' .* are not finite"),
    ("one row", {"images": TABLE[:, 0], "labels": LABELS}, {}, r"or a table \(n, features\) .* found shape \(12,\)"),
    ("video", {"images": PICTURES[..., None], "labels": LABELS}, {}, r"found shape \(12, 3, 6, 7, 1\)"),
    ("both ends", {"images": PICTURES[..., :3], "labels": LABELS}, {}, "the first or the last of the three .*`layout"),
    (
        "neither end",
        {"images": PICTURES.repeat(3, 1), "labels": LABELS},
        {},
        "neither the first nor the last .*`layout",
    ),
    (
        "grey or signals",
        {"images": PICTURES[:, 0], "labels": LABELS},
        {},
        "can be grey images .*or.* signals .*`layout",
    ),
    ("square", {"images": TABLE[:, :, None] * TABLE[:, None], "labels": LABELS}, {}, "can be grey images"),
    ("layout of a table", PAIR, {"layout": "channels_last"}, "is a table of shape .* and has no `layout`; remove it"),
    ("grey colour", {"images": PICTURES, "labels": LABELS}, {"layout": "grey"}, "`layout: grey` is for images"),
    ("range of a table", PAIR, {"value_range": "data"}, "`value_range` is for images"),
    (
        "int32",
        {"images": PICTURES.astype(np.int32), "labels": LABELS},
        {},
        "type int32 .* from 0 to 255, .*value_range",
    ),
    ("12 in 16", {"images": PICTURES.astype(np.uint16) * 16, "labels": LABELS}, {}, "type uint16 .*value_range"),
    (
        "beyond the range",
        {"images": PICTURES.astype(np.int32), "labels": LABELS},
        {"value_range": [0, 99]},
        r"beyond `value_range` \[0, 99\]; widen it",
    ),
    ("too large", {"images": TABLE.astype(np.float64) * 1e300, "labels": LABELS}, {}, "too large for float32"),
    ("several labels", {"images": TABLE, "labels": np.ones((N, 3))}, {}, "rows with a single 1 .* several labels"),
    ("values to learn", {"images": TABLE, "labels": TABLE[:, 0]}, {}, "expected whole numbers as labels"),
    (
        "no label",
        {"images": TABLE, "labels": LABELS - 1},
        {},
        "labels from 0 on .* found -1, which often stands for no",
    ),
    ("labels of pixels", {"images": TABLE, "labels": np.zeros((N, 2, 2))}, {}, "one label for each example"),
    ("test alone has 2", {**PAIR, "is_test": LABELS == 2}, {}, "labels 2 in .* are of test images alone"),
    ("all test", {**PAIR, "is_test": np.ones(N, dtype=bool)}, {}, "is True for all"),
    ("indices as is_test", {**PAIR, "is_test": np.arange(3)}, {}, r"of shape \(12,\), found int64 of shape \(3,\)"),
    ("few classes", {**PAIR, "classes": np.array(["a", "b"])}, {}, "labels 2 in .* are none of its 2 `classes`"),
    ("many classes", {**PAIR, "classes": np.array(list("abcd"))}, {}, "classes d in .* have no training images"),
    (
        "shapes that differ",
        {**PAIR, "test_images": TABLE[:, 1:], "test_labels": LABELS},
        {},
        "examples of one shape and type",
    ),
    ("shifted table", PAIR, {"augmentation": {"crop": 2, "flip": False}}, "rows of a table .* set the dataset's"),
    (
        "mirrored signals",
        {"images": SIGNALS, "labels": LABELS},
        {"augmentation": {"crop": 0, "flip": True}},
        r"found signals of shape \(2, 9\); set the dataset's `augmentation: \{crop: 0, flip: false\}`",
    ),
]


@pytest.mark.parametrize(("arrays", "settings", "message"), [row[1:] for row in ODD], ids=[row[0] for row in ODD])
def test_arrays_that_are_not_clear_are_refused_with_the_remedy(
    tmp_path: Path, arrays: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path, arrays, **settings)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (tmp_path / "unpickled").touch, ()

    np.savez(tmp_path / "a.npz", images=np.array([Bomb()], dtype=object), labels=LABELS)
    with pytest.raises(ValueError, match=r"it holds Python objects.*save it with numpy\.savez\(path, images="):
        read(tmp_path, "a.npz", "npz")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("source", ["npz", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 cut"])
def test_a_file_that_is_none_of_arrays_is_named(tmp_path: Path, source: str, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=rf"expected an? {source} file .*at '.*', but: .*; save it with"):
        read(tmp_path, "a", source)


def test_a_single_array_is_no_dataset(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TABLE)
    with pytest.raises(ValueError, match="a single array without a name"):
        read(tmp_path, "a.npy", "npz")


@pytest.mark.parametrize("source", ["npz", "safetensors"])
def test_a_file_of_arrays_that_is_not_there_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"a file of arrays at '.*nothing', found none; correct the dataset's"):
        read(tmp_path, "nothing", source)
    with pytest.raises(ValueError, match=f"a dataset of source {source} needs `path`"):
        read_images(source, tmp_path)


# What becomes of them


@pytest.mark.parametrize("values", [TABLE, SIGNALS, PICTURES, (PICTURES / 255).astype(np.float32)])
def test_everything_is_normalised_by_feature_or_channel(values: np.ndarray) -> None:
    images = torch.from_numpy(values)
    whole = ImageSet(images, torch.from_numpy(LABELS), torch.zeros(N, dtype=torch.bool), ("a", "b", "c"))
    mean, std = channel_statistics(images)
    axes = (0, *range(2, values.ndim))
    units = values / 255 if values.dtype == np.uint8 else values
    np.testing.assert_allclose(mean, units.mean(axis=axes), rtol=1e-5, atol=1e-6)
    chosen = LabelledImages.of(whole, np.arange(N), mean, std).images
    assert chosen.dtype == torch.float32
    np.testing.assert_allclose(chosen.mean(dim=axes).numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(chosen.std(dim=axes).numpy(), 1, atol=1e-4)


def test_float_images_and_the_same_of_8_bits_are_normalised_alike() -> None:
    eight, floats = torch.from_numpy(PICTURES), torch.from_numpy((PICTURES / 255).astype(np.float32))
    mean, std = normalisation_of("imagenet")
    torch.testing.assert_close(normalise(eight, mean, std), normalise(floats, mean, std), rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [torch.zeros(2, 5), torch.zeros(2, 3, 9)])
def test_an_augmentation_of_no_images_is_refused(images: torch.Tensor) -> None:
    check_augmentation(images, 0, False)
    with pytest.raises(ValueError, match="expected images to shift or mirror"):
        check_augmentation(images, 1, False)
    with pytest.raises(ValueError, match="expected images to shift or mirror"):
        check_augmentation(images, 0, True)


def test_normalisations_have_names() -> None:
    assert normalisation_of("imagenet") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation_of({"mean": [0.5], "std": [0.25]}) == ((0.5,), (0.25,))
    assert set(NORMALISATIONS) == {"imagenet", "cifar10", "cifar100"}
    with pytest.raises(ValueError, match="among imagenet, cifar10, cifar100 or `mean` and `std`, found 'imagenette'"):
        normalisation_of("imagenette")
