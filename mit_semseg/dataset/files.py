"""Reading image and label files: every kind of picture as RGB, every label as raw class values."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..lib.utils import UserError

# Tag and values of the EXIF orientations that swap width and height.
ORIENTATION_TAG, TRANSPOSED = 0x0112, (5, 6, 7, 8)
FULL_16_BIT = 65535
SMALL_SIDE = 16  # pixels below which a picture shows hardly anything
# From this size on Pillow takes a picture for a decompression bomb: a small file that unpacks to fill the memory.
MOST_PIXELS = 2 * 89_478_485
MOST_BYTES = 2**30
# A decoder that meets damaged bytes raises any exception there is.
_DAMAGE = Exception


@dataclass(frozen=True)
class ImageLimits:
    """What is opened at most.

    Attributes:
        pixels: of an image, at most `MOST_PIXELS`.
        bytes: of its file.
    """

    pixels: int = MOST_PIXELS
    bytes: int = MOST_BYTES


STANDARD_LIMITS = ImageLimits()


class ImageFileError(UserError, ValueError):
    """An image or label that cannot be used; the message names the file and what to do."""


def _open(
    path: str | os.PathLike | BinaryIO,
    name: str | None = None,
    formats: Sequence[str] | None = None,
    limits: ImageLimits = STANDARD_LIMITS,
) -> Image.Image:
    name = name or path
    try:
        size = os.stat(path).st_size if isinstance(path, (str, os.PathLike)) else 0
        if size > limits.bytes:
            raise ImageFileError(
                f"{name}: the file has {size} bytes, more than are opened: raise DATASET.max_bytes (now "
                f"{limits.bytes}), or save it smaller"
            )
        image = Image.open(path, formats=formats)
    except FileNotFoundError:
        raise ImageFileError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ImageFileError(f"{name}: no readable image (its format is not known)") from None
    except ImageFileError:
        raise
    except Image.DecompressionBombError:
        raise ImageFileError(f"{name}: more than {MOST_PIXELS} pixels, cut it into tiles") from None
    except _DAMAGE as error:
        raise ImageFileError(f"{name}: no readable image ({_said(error)})") from None
    if image.width * image.height > limits.pixels:
        width, height = image.size
        image.close()
        raise ImageFileError(
            f"{name}: {width}x{height} are {width * height} pixels, more than are opened: raise DATASET.max_pixels "
            f"(now {limits.pixels}), or make it smaller"
        )
    return image


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def image_size(
    path: str | os.PathLike, formats: Sequence[str] | None = None, limits: ImageLimits = STANDARD_LIMITS
) -> tuple[int, int]:
    """(width, height) as the picture is seen, from its header.

    Args:
        path: of the file.
        formats: that it may have, as Pillow calls them; None takes all that Pillow reads.
        limits: of the picture.

    Raises:
        ImageFileError: no readable image, or one above the limits.
    """
    with _open(path, formats=formats, limits=limits) as image:
        width, height = image.size
        if image.format == "PNG" and "exif" not in image.info:
            return width, height  # asking further would decode the pixels
        try:
            turned = image.getexif().get(ORIENTATION_TAG) in TRANSPOSED
        except _DAMAGE as error:
            raise ImageFileError(f"{path}: the image is damaged ({_said(error)})") from None
    return (height, width) if turned else (width, height)


def read_image(
    path: str | os.PathLike | BinaryIO,
    name: str | None = None,
    formats: Sequence[str] | None = None,
    limits: ImageLimits = STANDARD_LIMITS,
) -> Image.Image:
    """Any picture as RGB, 8 bits: turned as its EXIF says, transparency on white, 16-bit grey scaled.

    Args:
        path: or an open file.
        name: that errors have; None is the path.
        formats: as of `image_size`.
        limits: of the picture.

    Raises:
        ImageFileError: no readable image, one above the limits, or floating point pixels.
    """
    with _open(path, name, formats, limits) as image:
        return as_rgb(image, name or str(path))


def peculiarities(path: str | os.PathLike, limits: ImageLimits = STANDARD_LIMITS) -> list[str]:
    """What is unusual about a readable picture, and what is made of it.

    Raises:
        ImageFileError: no readable image, or one above the limits.
    """
    found = []
    with _open(path, limits=limits) as image:
        if image.mode != "RGB":
            found.append(f"mode {image.mode}, converted to RGB")
        if min(image.size) < SMALL_SIDE:
            found.append(f"a side below {SMALL_SIDE} pixels")
    try:
        with _open(path, limits=limits) as image:
            if getattr(image, "n_frames", 1) > 1:
                found.append("animated or of several pages, the first of which is used")
            if image.getexif().get(ORIENTATION_TAG, 1) != 1:
                found.append("turned as its EXIF says")
        with _open(path, limits=limits) as image:
            image.verify()  # also checksums that no decoder looks at
    except _DAMAGE as error:
        found.append(f"can be read, but is not quite as its format wants it ({_said(error)})")
    return found


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image as `read_image` gives it; errors likewise."""
    try:
        return _as_rgb(ImageOps.exif_transpose(image))
    except ImageFileError as error:
        raise ImageFileError(f"{name}: {error}") from None
    except _DAMAGE as error:
        raise ImageFileError(f"{name}: the image is damaged ({_said(error)})") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey; plain conversion would clip it at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > FULL_16_BIT:
            raise ImageFileError(f"grey values {values.min()} to {values.max()} are not 16-bit; save it as 8-bit")
        return Image.fromarray((values * 255 / FULL_16_BIT).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageFileError("floating point pixels have no known range; save it as an 8-bit image")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_label(path: str | os.PathLike, *, palette: bool = False, limits: ImageLimits = STANDARD_LIMITS) -> Image.Image:
    """A label file as a single-channel image of raw values: mode L where they are below 256, else I;16.

    Args:
        path: the file.
        palette: read palette images by their indices.
        limits: of the image.

    Raises:
        ImageFileError: no readable image, or not single-channel of 8 or 16 bits; says how to convert it.
    """
    with _open(path, limits=limits) as image:
        scale = _SCALED.get(str(image.tile[0][3]), 1) if image.tile else 1  # no more to be seen once it is loaded
        try:
            image.load()
        except _DAMAGE as error:
            raise ImageFileError(f"{path}: the label image is damaged ({_said(error)})") from None
        if image.mode in ("L", "P") and (image.mode == "L" or palette):
            return Image.fromarray(np.asarray(image) // np.uint8(scale))
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if values.min() >= 0 and values.max() <= FULL_16_BIT:
                return Image.fromarray(values.astype(np.uint8 if values.max() < 256 else np.uint16))
        raise ImageFileError(f"{path}: {_LABEL_FIX.get(image.mode, _OTHER_FIX).format(mode=image.mode)}")


# Grey values of PNG files with 2 or 4 bits per pixel, which Pillow spreads over 0 to 255.
_SCALED = {"L;2": 85, "L;4": 17}
_LABEL_FIX = {
    "P": "the label is a palette image (mode P); if its indices are the raw values set DATASET.palette_labels True, "
    "else save it as 8-bit grey",
    "RGB": "the label is an RGB picture, but labels are grey, with one value per class; map its colours to values and "
    "save it as mode L",
    "1": "the label has one bit per pixel (mode 1); save it as 8-bit grey with the values of your classes",
}
_LABEL_FIX["RGBA"] = _LABEL_FIX["RGB"]
_OTHER_FIX = (
    "the label has mode {mode}, but labels are grey of 8 or 16 bits; if all its values are whole and below 65536: "
    "Image.fromarray(np.asarray(Image.open(f)).astype('uint16')).save(f)"
)
