"""One image file as an array: what its pixels mean, how it is turned, and which size it gets."""

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

# What Pillow and its plugins raise on files that are damaged or no images.
DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
ORIENTATIONS = ("keep", "apply")
# What puts an image upright, by its orientation tag.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Remarks on an image.
TAGGED, TRANSPARENT, FRAMES = "orientation tag", "transparency", "several frames"


@dataclass(frozen=True)
class Decoding:
    """How images are decoded.

    Attributes:
        channels: 3 for colour, 1 for grey.
        image_size: Side in pixels of the centre that is cut out; None where all images have the same size already.
        resize: Pixels that the shorter side is scaled to before; None for `image_size`.
        orientation: `keep` leaves images as they are stored, `apply` turns them as their orientation tag says.
        value_range: What black and white are in images that have not 8 bits a channel: `type` for the range of their
            type, `data` for the smallest and largest value of the whole dataset, or these two numbers.
    """

    channels: int = 3
    image_size: int | None = None
    resize: int | None = None
    orientation: str = "keep"
    value_range: str | tuple[float, float] = "type"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"expected channels 1 (grey) or 3 (colour), found {self.channels}")
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"expected orientation {' or '.join(ORIENTATIONS)}, found '{self.orientation}'")
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise ValueError(
                f"expected `resize` beside an `image_size` that is no larger, found resize {self.resize} and "
                f"image_size {self.image_size}; the shorter side is scaled to `resize`, and "
                "a square of `image_size` cut out"
            )
        check_value_range(self.value_range)


def check_value_range(value_range: str | tuple[float, float]) -> None:
    """Refuse what is neither the name of a range nor two growing numbers.

    Raises:
        ValueError: It is neither.
    """
    if value_range in ("type", "data"):
        return
    numbers = value_range if isinstance(value_range, tuple) else ()
    if len(numbers) != 2 or not all(math.isfinite(number) for number in numbers) or numbers[0] >= numbers[1]:
        found = list(numbers) or repr(value_range)
        raise ValueError(
            f"expected value_range `type`, `data` or two growing numbers, what is black and what is white, "
            f"found {found}"
        )


@dataclass(frozen=True)
class Depth:
    """What the values of an image can be.

    Attributes:
        name: For messages.
        span: Values of black and white; None where the type does not say.
        grey: Whether the exact values are there; Pillow reads the upper 8 bits only of colour with 16.
        inverted: Whether the smallest value is white.
    """

    name: str
    span: tuple[float, float] | None
    grey: bool = True
    inverted: bool = False


EIGHT_BITS = Depth("8 bits", (0, 255))


@dataclass(frozen=True)
class Decoded:
    """One decoded image.

    Attributes:
        values: uint8 (channels, height, width), black to white. With `raw`, in the units of the file, and grey of more
            than 8 bits in one channel of float64.
        raw: Whether what black and white are is known only once all images are.
        depth: What its values can be.
        found: The smallest and largest value in the file.
        remarks: What is worth saying.
    """

    values: np.ndarray
    raw: bool
    depth: Depth
    found: tuple[float, float]
    remarks: frozenset[str]


def decode(handle: BinaryIO, how: Decoding) -> Decoded:
    """Decode the first frame of an image.

    Raises:
        Exception: One of `DECODING_ERRORS`, where the file is damaged or no image.
    """
    with Image.open(handle) as opened:
        remarks = {FRAMES} if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1 else set()
        depth = _depth_of(opened)
        opened.load()
        # Pillow turns TIFF files itself and takes their tag away.
        tag = _orientation_of(opened)
        image: Image.Image = opened
        if tag in TURNS:
            remarks.add(TAGGED)
            image = opened.transpose(TURNS[tag]) if how.orientation == "apply" else opened
        if depth.grey and depth is not EIGHT_BITS:
            values = np.asarray(image).astype(np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"{int((~np.isfinite(values)).sum())} pixels that are not finite")
            found = float(values.min()), float(values.max())
            # Float32 of what lies above the smallest value: large values would lose their differences.
            small = Image.fromarray((values - found[0]).astype(np.float32))
            if (sized := _sized(small, how)) is not small:
                values = np.asarray(sized).astype(np.float64) + found[0]
            return _decoded(values[None], depth, found, remarks, how)
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            remarks.add(TRANSPARENT)
        pixels = np.asarray(_sized(_flat(image, how.channels), how), dtype=np.uint8)
    array = pixels[None] if how.channels == 1 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    return _decoded(array, depth, (float(array.min()), float(array.max())), remarks, how)


def _decoded(values: np.ndarray, depth: Depth, found: tuple[float, float], remarks: set[str], how: Decoding) -> Decoded:
    """An image that is scaled at once where its range is known, for raw ones take eight times the memory."""
    span = depth.span if isinstance(how.value_range, str) else how.value_range
    if how.value_range == "data" or span is None:
        return Decoded(values, True, depth, found, frozenset(remarks))
    return Decoded(to_bytes(values, span, depth, how.channels), False, depth, found, frozenset(remarks))


def to_bytes(values: np.ndarray, span: tuple[float, float], depth: Depth, channels: int) -> np.ndarray:
    """Scale an image to 8 bits.

    Args:
        values: (channels, height, width), or grey in one channel.
        span: Values of black and white.
        depth: What values can be.
        channels: Of the result.

    Returns:
        uint8 (channels, height, width). Whether values lie in the range is for the caller to check.
    """
    if values.dtype == np.uint8 and span == (0, 255):
        return values
    shares = (values.astype(np.float64) - span[0]) / (span[1] - span[0])
    # Scaling an image to another size rounds: a hair beyond the range is no clipping.
    scaled = np.rint(255 * np.clip(1 - shares if depth.inverted else shares, 0, 1)).astype(np.uint8)
    return scaled if len(scaled) == channels else np.repeat(scaled, channels, axis=0)


def _depth_of(image: Image.Image) -> Depth:
    """What the values of an image that is opened but not yet loaded can be.

    Raises:
        ValueError: Pillow would read them wrongly.
    """
    tile = image.tile[0].args if image.tile else ()  # type: ignore[attr-defined]
    raw = next((part for part in (tile if isinstance(tile, tuple) else (tile,)) if isinstance(part, str)), "")
    tags: Mapping[int, object] = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT) in (2, (2,))
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE)
    if image.mode == "F":
        return Depth("32-bit float", (0, 1), inverted=inverted)
    if image.mode.startswith("I;16"):
        name, white = ("12 bits", 4095) if bits == (12,) else ("16 bits", 65535)
        return Depth(name, (0, white), inverted=inverted)
    if image.mode == "I":
        if image.format in ("PNG", "PPM"):  # both have 16 bits, Pillow scales other maxima of PPM to them
            return Depth("16 bits", (0, 65535))
        return Depth(f"{'16-bit' if bits == (16,) else '32-bit'} integers", None, inverted=inverted)
    if signed:
        raise ValueError("8 bits with a sign, which Pillow reads as if there were none; save it as 8 bits without")
    return Depth("16-bit colour", (0, 255), grey=False) if ";16" in raw else EIGHT_BITS


def _orientation_of(image: Image.Image) -> int:
    """The orientation tag of a loaded image, 1 (upright) where there is none."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODING_ERRORS:
        return 1  # damaged metadata, around pixels that are whole
    return tag if isinstance(tag, int) else 1


def _flat(image: Image.Image, channels: int) -> Image.Image:
    """An image of 8 bits in colour or grey; transparency is dropped, as torchvision's loader does."""
    if image.mode in ("PA", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("CMYK", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _sized(image: Image.Image, how: Decoding) -> Image.Image:
    """An image scaled by its shorter side, bilinear with antialiasing, and cropped at the centre.

    Source:
        With `resize`, `Resize` and `CenterCrop` of torchvision.transforms.v2, to the pixel.
    """
    size, resize = how.image_size, how.resize
    if size is None or (resize is None and image.size == (size, size)):
        return image
    shorter = min(image.size)
    if resize is None:
        scale = size / shorter
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
    else:
        width, height = (resize if side == shorter else int(resize * side / shorter) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))
