"""Read and write images window by window, with georeference, through rasterio (extra `raster`)."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ..lib.utils import UserError, WriteError
from .image_io import MAX_8_BIT, MAX_16_BIT, ImageFileError

CACHE_BYTES = 128 * 2**20  # memory for decoded blocks
BLOCK = 512  # height and width of the blocks of written files
SOFTWARE = "mit_semseg"  # value of the tag that identifies files of this program
SOFTWARE_TAG = "TIFFTAG_SOFTWARE"


def is_tiff(path: str | os.PathLike) -> bool:
    return str(path).lower().endswith((".tif", ".tiff"))


@cache
def _rasterio():
    try:
        import rasterio
    except ImportError:
        raise UserError(
            'large images and images with DATASET.mean need rasterio; run pip install -e ".[raster]"'
        ) from None
    # `warnings.catch_warnings` would not be thread-safe.
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


@contextmanager
def _reading(path: str | os.PathLike) -> Iterator[None]:
    """Context that converts errors of rasterio to ImageFileError."""
    try:
        yield
    except _rasterio().errors.RasterioError as error:
        reason = "file not found" if not Path(path).is_file() else error
        raise ImageFileError(f"{path}: cannot be read ({reason})") from None


@dataclass(frozen=True)
class Raster:
    """An open image file. Its methods raise ImageFileError if the file is damaged."""

    source: object  # a rasterio dataset
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.source.width, self.source.height

    @property
    def is_windowed(self) -> bool:
        """Whether the file is tiled or georeferenced."""
        return self.source.profile.get("tiled", False) or bool(self.source.crs or self.source.gcps[0])

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Return the pixels (h, w, channels) of a window; parts outside the image are omitted."""
        with _reading(self.name):
            return np.moveaxis(self.source.read(window=self._window(rows, columns)), 0, -1)

    def read_with_nan(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Return the pixels of a window. If pixels without data exist, the result is float32, and they are NaN."""
        pixels, valid = self.read(rows, columns), self.valid(rows, columns)
        return pixels if valid is None else np.where(valid[..., None], pixels, np.float32(np.nan)).astype(np.float32)

    def read_rgb(self, rows: slice, columns: slice) -> np.ndarray:
        """Return the colors (h, w, 3) uint8 of a window of a gray (8 or 16 bits), palette or RGB image (8 bits).

        Raises:
            ImageFileError: the file is damaged or has another type of pixels.
        """
        gray_16_bit = self.source.dtypes == ("uint16",)
        if not gray_16_bit and set(self.source.dtypes) != {"uint8"}:
            raise ImageFileError(
                f"{self.name} has pixels of type {self.source.dtypes[0]}, not uint8; train a network with DATASET.mean "
                f"for such images"
            )
        pixels = self.read(rows, columns)
        if gray_16_bit:
            pixels = (pixels * np.float32(MAX_8_BIT / MAX_16_BIT)).round().astype(np.uint8)
        elif self.source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
            pixels = 255 - pixels
        if self.source.colorinterp[0].name == "palette":
            colors = self.source.colormap(1)
            return np.array([colors.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8)[pixels[..., 0]]
        return np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2))

    def valid(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray | None:
        """Return which pixels of a window (h, w) have data; None if the file marks no pixels as missing."""
        flags = _rasterio().enums.MaskFlags
        if all(flags.all_valid in band for band in self.source.mask_flag_enums):
            return None
        with _reading(self.name):
            return self.source.dataset_mask(window=self._window(rows, columns)) > 0

    def _window(self, rows: slice, columns: slice):
        parts = zip((rows, columns), self.source.shape, strict=True)
        return _rasterio().windows.Window.from_slices(*(slice(*part.indices(side)[:2]) for part, side in parts))


@contextmanager
def open_raster(path: str | os.PathLike) -> Iterator[Raster]:
    """Open an image file; raise ImageFileError if it cannot be read, and UserError if rasterio is not installed."""
    rasterio = _rasterio()
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        with _reading(path):
            source = rasterio.open(path)
        with source:
            if (orientation := source.tags().get("EXIF_Orientation", "1")) != "1":
                raise ImageFileError(
                    f"{path}: EXIF orientations (here {orientation}) are not supported for large images and with "
                    f"DATASET.mean; rotate the pixels, for example with mogrify -auto-orient"
                )
            yield Raster(source, str(path))


def raster_software(path: str | os.PathLike) -> str:
    """Return the name of the program that wrote a TIFF file, or '' if it is unknown."""
    with open_raster(path) as raster:
        return raster.source.tags().get(SOFTWARE_TAG, "")


class RasterWriter:
    """A TIFF file with one channel that is written from top to bottom."""

    def __init__(self, target):
        self._target = target

    def write(self, pixels: np.ndarray, rows: slice) -> None:
        """Write some rows (h, W)."""
        window = _rasterio().windows.Window(0, rows.start, pixels.shape[1], rows.stop - rows.start)
        self._target.write(pixels.astype(self._target.dtypes[0], copy=False), 1, window=window)


@contextmanager
def create_raster(
    path: str | os.PathLike,
    like: Raster,
    *,
    dtype: np.dtype,
    nodata: int | None,
    colors: Mapping[int, Sequence[int]] | None = None,
) -> Iterator[RasterWriter]:
    """Create a compressed, tiled TIFF file with the size and the georeference of another image.

    Args:
        path: output file.
        like: image whose size and georeference are used.
        dtype: uint8 or uint16.
        nodata: value of pixels without data, or None.
        colors: value -> (R, G, B), stored as color table in uint8 files.

    Raises:
        WriteError: the file cannot be written.
    """
    rasterio = _rasterio()
    (width, height), source = like.size, like.source
    profile = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": dtype, "nodata": nodata}
    profile |= {"compress": "deflate", "BIGTIFF": "IF_SAFER"}
    if min(width, height) >= BLOCK:
        profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    points, points_crs = source.gcps
    profile |= {"gcps": points, "crs": points_crs} if points else {"crs": source.crs, "transform": source.transform}
    try:
        with rasterio.open(path, "w", **profile) as target:
            target.update_tags(**{SOFTWARE_TAG: SOFTWARE})
            if colors and dtype == np.uint8:
                target.write_colormap(1, {value: (*color, 255) for value, color in colors.items()})
            yield RasterWriter(target)
    except rasterio.errors.RasterioError as error:
        raise WriteError(f"{path}: cannot be written ({error})") from None
