"""Decoding image and label files: any image as RGB, any label as the values stored in the file."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..lib.utils import UserError

# EXIF tag of the orientation, its value for an upright image, and the values that swap width and height.
ORIENTATION_TAG, UPRIGHT, TRANSPOSED = 0x0112, 1, (5, 6, 7, 8)
TIFF_WIDTH, TIFF_HEIGHT = 256, 257  # tags
FULL_8_BIT, FULL_16_BIT = 255, 65535
SMALL_SIDE = 16  # pixels; the doctor reports smaller images
# Pillow refuses larger images as decompression bombs: small files that unpack to fill the memory.
MOST_PIXELS = 2 * 89_478_485
MOST_BYTES = 2**30
# Decoders raise any type of exception for damaged bytes.
_DAMAGE = Exception


@dataclass(frozen=True)
class ImageLimits:
    """Largest image that is opened.

    Attributes:
        pixels: of the image, at most `MOST_PIXELS`.
        bytes: of its file.
    """

    pixels: int = MOST_PIXELS
    bytes: int = MOST_BYTES


STANDARD_LIMITS = ImageLimits()


class ImageFileError(UserError, ValueError):
    """An image or label that cannot be used; the message names the file and what to do."""


@contextmanager
def _open(
    source: str | os.PathLike | BinaryIO,
    name: str | None = None,
    formats: Sequence[str] | None = None,
    limits: ImageLimits = STANDARD_LIMITS,
) -> Iterator[Image.Image]:
    name, is_path = name or source, isinstance(source, (str, os.PathLike))
    try:
        size = os.stat(source).st_size if is_path else 0
        # A file object, not a path: Pillow maps uncompressed files opened by path into memory, with the wrong row
        # length for TIFF orientations that swap the sides.
        opened = open(source, "rb") if is_path else nullcontext(source)  # noqa: SIM115, closed below
    except FileNotFoundError:
        windows = "; the list contains Windows paths: replace \\ by /" if "\\" in str(name) and os.sep == "/" else ""
        raise ImageFileError(f"{name}: no such file{windows}") from None
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{name}: no readable image ({_reason(error)})") from None
    with opened as file:
        if size > limits.bytes:
            raise ImageFileError(
                f"{name}: the file has {size} bytes, DATASET.max_bytes allows {limits.bytes}: raise it, or save the "
                f"image smaller"
            )
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ImageFileError(f"{name}: no readable image (unknown format)") from None
        except Image.DecompressionBombError:
            raise ImageFileError(f"{name}: more than {MOST_PIXELS} pixels, cut it into tiles") from None
        except _DAMAGE as error:
            raise ImageFileError(f"{name}: no readable image ({_reason(error)})") from None
        with image:
            if image.width * image.height > limits.pixels:
                raise ImageFileError(
                    f"{name}: {image.width}x{image.height} are {image.width * image.height} pixels, DATASET.max_pixels "
                    f"allows {limits.pixels}: raise it, or make the image smaller"
                )
            yield image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def image_size(
    path: str | os.PathLike, formats: Sequence[str] | None = None, limits: ImageLimits = STANDARD_LIMITS
) -> tuple[int, int]:
    """(width, height) after the EXIF or TIFF orientation is applied, from the header alone.

    Args:
        path: of the file.
        formats: allowed formats by Pillow's names; None allows all that Pillow reads.
        limits: of the image.

    Raises:
        ImageFileError: no readable image, or one above the limits.
    """
    with _open(path, formats=formats, limits=limits) as image:
        width, height = image.size
        if image.format == "PNG" and not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
            return width, height  # `getexif` would decode the pixels to look for a chunk behind them
        try:
            if image.format == "TIFF":  # whose `size` is transposed already in some versions of Pillow
                width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
            transposed = _orientation(image) in TRANSPOSED
        except _DAMAGE as error:
            raise ImageFileError(f"{path}: the image is damaged ({_reason(error)})") from None
    return (height, width) if transposed else (width, height)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ORIENTATION_TAG, UPRIGHT)


def read_image(
    path: str | os.PathLike | BinaryIO,
    name: str | None = None,
    formats: Sequence[str] | None = None,
    limits: ImageLimits = STANDARD_LIMITS,
) -> Image.Image:
    """Any image as 8-bit RGB: EXIF orientation applied, transparency on white, 16-bit grey scaled.

    Args:
        path: or an open file.
        name: used in errors; None is the path.
        formats: as for `image_size`.
        limits: of the image.

    Returns:
        The image; `info["orientation"]` is the EXIF orientation that was applied (1: none).

    Raises:
        ImageFileError: no readable image, one above the limits, or floating point pixels.
    """
    with _open(path, name, formats, limits) as image:
        return as_rgb(image, name or str(path))


def peculiarities(path: str | os.PathLike, limits: ImageLimits = STANDARD_LIMITS) -> list[str]:
    """Unusual properties of a readable image, and how `read_image` treats them.

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
            if _orientation(image) != UPRIGHT:
                found.append("orientation applied as in its EXIF")
            if image.mode.startswith("I"):
                low, high = image.getextrema()
                if high <= FULL_16_BIT // 2:
                    found.append(
                        f"16-bit grey that uses {low} to {high} of 0 to {FULL_16_BIT} only: it is read as dark"
                    )
        with _open(path, limits=limits) as image:
            image.verify()  # also checksums that no decoder checks
    except _DAMAGE as error:
        found.append(f"can be read, but violates its format ({_reason(error)})")
    return found


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image as returned by `read_image`; same errors."""
    try:
        orientation = _orientation(image)
        rgb = _as_rgb(ImageOps.exif_transpose(image))
    except ImageFileError as error:
        raise ImageFileError(f"{name}: {error}") from None
    except _DAMAGE as error:
        raise ImageFileError(f"{name}: the image is damaged ({_reason(error)})") from None
    rgb.info["orientation"] = orientation
    return rgb


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


# Lossless formats that store one value per pixel, by Pillow's names (PPM includes PGM and PBM).
LABEL_FORMATS = ("PNG", "TIFF", "BMP", "PPM", "GIF", "TGA", "PCX")
LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # compressions
_EXPORT_AGAIN = "export it again as PNG from where it was drawn: its values cannot be recovered from this file"
_LABEL_FIX = {
    "P": "the label is a palette image (mode P); if its indices are the label values set DATASET.palette_labels True, "
    "else save it as 8-bit grey",
    "RGB": "the label is an RGB image, but labels are grey, with one value per class; map its colours to values and "
    "save it as mode L",
    "LA": "the label has an alpha channel (mode LA); save its grey channel alone: "
    "Image.open(f).getchannel('L').save('label.png')",
    "F": "the label has floating point pixels (mode F); if all its values are whole and below 65536: "
    "Image.fromarray(np.asarray(Image.open(f)).astype('uint16')).save('label.png')",
}
_LABEL_FIX["RGBA"] = _LABEL_FIX["RGB"]
_OTHER_FIX = "the label has mode {mode}, but labels are grey, of at most 16 bits; save it as an 8-bit grey PNG"


def read_label(path: str | os.PathLike, *, palette: bool = False, limits: ImageLimits = STANDARD_LIMITS) -> Image.Image:
    """A label file as a single-channel image of the values stored in it, whatever its bit depth and brightness scale.

    Args:
        path: the file.
        palette: read palette images by their indices.
        limits: of the image.

    Returns:
        Mode L where all values are below 256, else I;16, with the EXIF orientation applied as in `read_image`.

    Raises:
        ImageFileError: no readable image, lossy, or not single-channel of at most 16 bits; says how to convert it.
    """
    with _open(path, limits=limits) as image:
        if image.format in LOSSY_FORMATS or image.info.get("compression") in LOSSY_TIFF:
            raise ImageFileError(f"{path}: {image.format} compression changes label values; {_EXPORT_AGAIN}")
        if image.format not in LABEL_FORMATS:
            raise ImageFileError(f"{path}: labels are not read from {image.format} files; save it as an 8-bit grey PNG")
        try:
            _unpack_grey_bmp(image)
            packing = image.tile[0] if image.tile else ("", (), 0, "")
            orientation = _orientation(image)
            image.load()
        except _DAMAGE as error:
            raise ImageFileError(f"{path}: the label image is damaged ({_reason(error)})") from None
        if image.mode in ("F", "P") and not (image.mode == "P" and palette):
            raise ImageFileError(f"{path}: {_LABEL_FIX[image.mode]}")
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise ImageFileError(f"{path}: {_LABEL_FIX.get(image.mode, _OTHER_FIX).format(mode=image.mode)}")
        values = _stored_values(image, packing[0], packing[3])
        low, high = values.min(), values.max()
        if low < 0 or high > FULL_16_BIT:
            raise ImageFileError(f"{path}: the label has values from {low} to {high}; allowed: 0 to {FULL_16_BIT}")
        label = Image.fromarray(values.astype(np.uint8 if high <= FULL_8_BIT else np.uint16, copy=False))
        if image.format != "TIFF" and orientation != UPRIGHT:  # Pillow transposes TIFF files when it loads them
            label.getexif()[ORIENTATION_TAG] = orientation
            label = ImageOps.exif_transpose(label)
    label.info["orientation"] = orientation
    return label


def _unpack_grey_bmp(image: Image.Image) -> None:
    """Let Pillow unpack a grey BMP of 4 bits per pixel: it takes one whose palette has grey level i at index i for one
    of 8 bits."""
    if image.format == "BMP" and image.mode == "L" and image.tile[0][0] == "raw":
        image.fp.seek(28)
        if int.from_bytes(image.fp.read(2), "little") == 4:
            codec, extents, offset, (_, *layout) = image.tile[0]
            image.tile = [(codec, extents, offset, ("L;4", *layout))]


def _stored_values(image: Image.Image, codec: str, arguments) -> np.ndarray:
    """Values as stored in the file, integers (H, W): Pillow scales and inverts some to be brightnesses.

    Args:
        image: loaded, with one channel.
        codec, arguments: of the image's tile, before it was loaded.
    """
    values = np.asarray(image)
    if codec in ("ppm", "ppm_plain") and image.mode != "1":
        full = FULL_8_BIT if image.mode == "L" else FULL_16_BIT
        return np.rint(values * (arguments[1] / full)).astype(np.int64)
    mode, _, bits = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments).partition(";")
    if mode == "1":
        return (values ^ ("I" in bits)).astype(np.uint8)
    if mode != "L":
        return values
    if "I" in bits:  # TIFF files whose photometric interpretation is WhiteIsZero
        values = FULL_8_BIT - values
    return values // {"2": 85, "4": 17}.get(bits[:1], 1)
