"""Reading image and label files: every kind of picture as RGB, every label as raw class values."""

import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..lib.utils import UserError

# Tag and values of the EXIF orientations that swap width and height.
ORIENTATION_TAG, TRANSPOSED = 0x0112, (5, 6, 7, 8)
FULL_16_BIT = 65535
# What Pillow raises on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageFileError(UserError, ValueError):
    """An image or label that cannot be used; the message names the file and what to do."""


def _open(
    path: str | os.PathLike | BinaryIO, name: str | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    try:
        return Image.open(path, formats=formats)
    except FileNotFoundError:
        raise ImageFileError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ImageFileError(f"{name or path}: no readable image (its format is not known)") from None
    except _DAMAGE as error:
        raise ImageFileError(f"{name or path}: no readable image ({error})") from None


def image_size(path: str | os.PathLike, formats: Sequence[str] | None = None) -> tuple[int, int]:
    """(width, height) as the picture is seen, from its header.

    Args:
        path: of the file.
        formats: that it may have, as Pillow calls them; None takes all that Pillow reads.

    Raises:
        ImageFileError: no readable image.
    """
    with _open(path, formats=formats) as image:
        width, height = image.size
        if image.format == "PNG" and "exif" not in image.info:
            return width, height  # asking further would decode the pixels
        try:
            turned = image.getexif().get(ORIENTATION_TAG) in TRANSPOSED
        except _DAMAGE as error:
            raise ImageFileError(f"{path}: the image is damaged ({error})") from None
    return (height, width) if turned else (width, height)


def read_image(
    path: str | os.PathLike | BinaryIO, name: str | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """Any picture as RGB, 8 bits: turned as its EXIF says, transparency on white, 16-bit grey scaled.

    Args:
        path: or an open file.
        name: that errors have; None is the path.
        formats: as of `image_size`.

    Raises:
        ImageFileError: no readable image, or floating point pixels.
    """
    with _open(path, name, formats) as image:
        return as_rgb(image, name or str(path))


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image as `read_image` gives it; errors likewise."""
    try:
        return _as_rgb(ImageOps.exif_transpose(image))
    except ImageFileError as error:
        raise ImageFileError(f"{name}: {error}") from None
    except _DAMAGE as error:
        raise ImageFileError(f"{name}: the image is damaged ({error})") from None


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


def read_label(path: str | os.PathLike, *, palette: bool = False) -> Image.Image:
    """A label file as an 8-bit single-channel image (mode L) of raw values.

    Args:
        path: the file.
        palette: read palette images by their indices.

    Raises:
        ImageFileError: no readable image, or not 8-bit single-channel; says how to convert it.
    """
    with _open(path) as image:
        try:
            image.load()
        except _DAMAGE as error:
            raise ImageFileError(f"{path}: the label image is damaged ({error})") from None
        if image.mode in ("L", "P") and (image.mode == "L" or palette):
            return Image.fromarray(np.asarray(image))
        raise ImageFileError(f"{path}: {_LABEL_FIX.get(image.mode, _OTHER_FIX).format(mode=image.mode)}")


_LABEL_FIX = {
    "P": "the label is a palette image (mode P); if its indices are the raw values set DATASET.palette_labels True, "
    "else save it as 8-bit grey",
    "RGB": "the label is an RGB picture, but labels are 8-bit grey with one value per class; map its colours to values "
    "and save it as mode L",
    "1": "the label has one bit per pixel (mode 1); save it as 8-bit grey with the values of your classes",
}
_LABEL_FIX["RGBA"] = _LABEL_FIX["RGB"]
_OTHER_FIX = (
    "the label has mode {mode}, but labels are 8-bit grey (mode L); if all its values are below 256: "
    "Image.fromarray(np.asarray(Image.open(f)).astype('uint8')).save(f)"
)
