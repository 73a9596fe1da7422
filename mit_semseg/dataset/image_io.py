"""Decode image files to RGB, and label files to their stored values."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..lib.utils import UserError

# EXIF orientation: tag number, value of upright images, values of images with swapped width and height.
ORIENTATION_TAG, UPRIGHT, TRANSPOSED = 0x0112, 1, (5, 6, 7, 8)
TIFF_WIDTH, TIFF_HEIGHT = 256, 257  # tag numbers
MAX_8_BIT, MAX_16_BIT = 255, 65535
SMALL_SIDE = 16  # in pixels; doctor.py reports images with a smaller side
Source = str | os.PathLike | BinaryIO


class ImageFileError(UserError, ValueError):
    """An image or label file cannot be used. The message names the file."""


@contextmanager
def _open(source: Source, name: str | None = None, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """Open an image file with Pillow; raise ImageFileError if it is missing or no image. `name` is for messages."""
    name = name or source
    try:
        # `Image.open(path)` would memory-map uncompressed files. Then the row length is wrong for TIFF files whose
        # orientation swaps width and height.
        opened = open(source, "rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source)  # noqa: SIM115
    except FileNotFoundError:
        hint = "; the list has Windows paths; replace \\ by /" if "\\" in str(name) and os.sep == "/" else ""
        raise ImageFileError(f"{name}: file not found{hint}") from None
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{name}: cannot be opened ({_reason(error)})") from None
    with opened as file:
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ImageFileError(f"{name}: not an image, or not in a format that Pillow reads") from None
        except Image.DecompressionBombError:
            limit = 2 * Image.MAX_IMAGE_PIXELS
            raise ImageFileError(
                f"{name}: the image has more than {limit} pixels; split it into tiles. test.py segments such images "
                f'after pip install -e ".[raster]"'
            ) from None
        except Exception as error:  # for damaged files, Pillow raises exceptions of many types
            raise ImageFileError(f"{name}: cannot be read as an image ({_reason(error)})") from None
        with image:
            yield image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def image_size(path: str | os.PathLike, formats: Sequence[str] | None = None) -> tuple[int, int]:
    """Read (width, height) from the header and apply the EXIF orientation. `formats`: names of the allowed formats."""
    with _open(path, formats=formats) as image:
        width, height = image.size
        if image.format == "PNG" and not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
            return width, height  # `getexif` would decode all pixels to find EXIF data at the end of the file
        try:
            if image.format == "TIFF":  # in some versions of Pillow, the orientation is already applied to `size`
                width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
            transposed = _orientation(image) in TRANSPOSED
        except Exception as error:
            raise ImageFileError(f"{path}: the image is damaged ({_reason(error)})") from None
    return (height, width) if transposed else (width, height)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ORIENTATION_TAG, UPRIGHT)


def read_image(path: Source, name: str | None = None, formats: Sequence[str] | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB. Apply the EXIF orientation, use a white background, and scale 16-bit gray.

    `info["orientation"]` of the returned image is the applied EXIF orientation (1: upright). `name` replaces the path
    in error messages. Raise ImageFileError if the file cannot be read, or its pixels are not integers of 1 to 16 bits.
    """
    with _open(path, name, formats) as image:
        return as_rgb(image, name or str(path))


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an open Pillow image to RGB as `read_image` does. `name` is for error messages."""
    try:
        orientation = _orientation(image)
        rgb = _convert_to_rgb(ImageOps.exif_transpose(image))
    except ImageFileError as error:
        raise ImageFileError(f"{name}: {error}") from None
    except Exception as error:
        raise ImageFileError(f"{name}: the image is damaged ({_reason(error)})") from None
    rgb.info["orientation"] = orientation
    return rgb


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > MAX_16_BIT:
            raise ImageFileError(f"gray values {values.min()}..{values.max()} are not 16-bit; save an 8-bit image")
        return Image.fromarray((values * MAX_8_BIT / MAX_16_BIT).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageFileError("floating point pixels are not supported; save an 8-bit image")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def orientation_mismatch(image: Image.Image, label: Image.Image) -> str:
    """Return a message if the EXIF orientations of an image and its label differ, else ''."""
    first, second = image.info["orientation"], label.info["orientation"]
    return f"EXIF orientation {first} of the image, but {second} of its label" if first != second else ""


def unusual_properties(path: str | os.PathLike) -> list[str]:
    """Return messages that name unusual properties of a readable image and their handling by `read_image`."""
    found = []
    try:
        with _open(path) as image:
            if image.mode != "RGB":
                found.append(f"mode {image.mode} is converted to RGB")
            if min(image.size) < SMALL_SIDE:
                found.append(f"width or height is below {SMALL_SIDE} pixels")
            if getattr(image, "n_frames", 1) > 1:
                found.append("several frames or pages; only the first one is used")
            if _orientation(image) != UPRIGHT:
                found.append("an EXIF orientation is applied")
            if image.mode.startswith("I") and image.getextrema()[1] <= MAX_16_BIT // 2:
                found.append(f"dark 16-bit gray image; all values are below {MAX_16_BIT // 2 + 1}")
        with _open(path) as image:
            image.verify()  # compares checksums, which decoding ignores
    except Exception as error:
        found.append(f"readable, but not a valid file ({_reason(error)})")
    return found


LABEL_FORMATS = ("PNG", "TIFF", "BMP", "PPM", "GIF", "TGA", "PCX")  # lossless formats; PPM includes PGM and PBM
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # lossy compression methods
_NOT_GRAY = {
    "P": "a palette (mode P); set DATASET.label_format palette if the indices are the label values, or colors if the "
    "colors are those of the class table",
    "LA": "an alpha channel (mode LA); save the gray channel with Image.open(f).getchannel('L').save('label.png')",
    "RGB": "colors (mode RGB); set DATASET.label_format colors if they are those of the class table",
    "F": "floating point pixels (mode F); convert them to integers with "
    "Image.fromarray(np.asarray(Image.open(f)).astype('uint16')).save('label.png')",
}


_NOT_GRAY_OTHER = "mode {}; save one value per class as gray PNG (mode L)"


def read_label(
    path: str | os.PathLike, kind: str = "gray", values_of_colors: Callable[[np.ndarray], np.ndarray] | None = None
) -> Image.Image:
    """Read the label values in a file.

    Args:
        path: file in a lossless format.
        kind: `gray` for gray pixels with at most 16 bits; `palette` also allows palette indices; with `colors`,
            `values_of_colors` converts the colors (H, W) int32, R + 256 * G + 65536 * B, to label values (H, W).
        values_of_colors: function, see `kind`; raises ImageFileError for unknown colors.

    Returns:
        An image of mode L, or of mode I;16 if there are values above 255. `info["orientation"]` is the applied EXIF
        orientation.

    Raises:
        ImageFileError: the file is damaged, has a lossy format, or has pixels of another type.
    """
    with _open(path) as image:
        compression = image.info.get("compression", "")
        if image.format not in LABEL_FORMATS or compression in LOSSY_TIFF:
            name = f"{image.format} {compression}".strip()
            raise ImageFileError(f"{path}: labels need a lossless format, found {name}; export them as 8-bit gray PNG")
        try:
            codec, _, _, arguments = image.tile[0] if image.tile else ("", (), 0, "")
            orientation = _orientation(image)
            image.load()
        except Exception as error:
            raise ImageFileError(f"{path}: the label image is damaged ({_reason(error)})") from None
        gray = image.mode in ("1", "L") or image.mode.startswith("I") or (image.mode == "P" and kind == "palette")
        if not gray and kind != "colors":
            problem = _NOT_GRAY.get(image.mode, _NOT_GRAY_OTHER.format(image.mode))
            raise ImageFileError(f"{path}: labels must be gray with at most 16 bits; found {problem}")
        values = _colors(image, path, values_of_colors) if values_of_colors else _stored_values(image, codec, arguments)
        low, high = values.min(), values.max()
        if low < 0 or high > MAX_16_BIT:
            raise ImageFileError(f"{path}: label values {low}..{high} are not in 0..{MAX_16_BIT}")
        label = Image.fromarray(values.astype(np.uint8 if high <= MAX_8_BIT else np.uint16, copy=False))
        if image.format != "TIFF" and orientation != UPRIGHT:  # Pillow has already transposed TIFF images
            label.getexif()[ORIENTATION_TAG] = orientation
            label = ImageOps.exif_transpose(label)
    label.info["orientation"] = orientation
    return label


def _colors(
    image: Image.Image, path: str | os.PathLike, values_of_colors: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the label values of the colors of an image; transparency is ignored."""
    pixels = np.asarray(image.convert("RGB").convert("RGBA")).view("<i4")[..., 0] & 0xFFFFFF
    try:
        return values_of_colors(pixels)
    except ImageFileError as error:
        raise ImageFileError(f"{path}: {error}") from None


def _stored_values(image: Image.Image, codec: str, arguments) -> np.ndarray:
    """Undo Pillow's scaling and inversion of gray values. `codec` and `arguments` are those in `image.tile[0]`."""
    values = np.asarray(image)
    if codec in ("ppm", "ppm_plain") and image.mode != "1":
        maximum = MAX_8_BIT if image.mode == "L" else MAX_16_BIT
        return np.rint(values * (arguments[1] / maximum)).astype(np.int64)
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    mode, _, bits = str(raw_mode).partition(";")
    if mode == "1":
        return (values ^ ("I" in bits)).astype(np.uint8)
    if mode != "L":
        return values
    if "I" in bits:  # TIFF with photometric interpretation WhiteIsZero
        values = MAX_8_BIT - values
    return values // {"2": 85, "4": 17}.get(bits[:1], 1)
