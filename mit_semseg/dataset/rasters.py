"""Read and write images window by window, with georeference, through rasterio (extra `raster`)."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..lib.utils import UserError
from .image_io import ImageFileError

CACHE_BYTES = 128 * 2**20  # memory for decoded blocks
BLOCK = 512  # height and width of the blocks of written files
SOFTWARE = "mit_semseg"  # value of the tag that identifies files of this program


def is_tiff(path: str | os.PathLike) -> bool:
    return str(path).lower().endswith((".tif", ".tiff"))


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


@dataclass(frozen=True)
class Raster:
    """An open image file."""

    source: object  # a rasterio dataset
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.source.width, self.source.height

    @property
    def is_windowed(self) -> bool:
        """Whether the file is tiled or georeferenced."""
        return self.source.profile.get("tiled", False) or self.source.crs is not None

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Return the pixels (h, w, channels) of a window."""
        window = _rasterio().windows.Window.from_slices(
            *(slice(*part.indices(length)[:2]) for part, length in zip((rows, columns), self.source.shape, strict=True))
        )
        return np.moveaxis(self.source.read(window=window), 0, -1)

    def valid(self, rows: slice) -> np.ndarray | None:
        """Return which pixels of some rows (h, W) have data; None if the file marks no pixels as missing."""
        flags = _rasterio().enums.MaskFlags
        if all(flags.all_valid in band for band in self.source.mask_flag_enums):
            return None
        window = _rasterio().windows.Window(0, rows.start, self.source.width, rows.stop - rows.start)
        return self.source.dataset_mask(window=window) > 0


@contextmanager
def open_raster(path: str | os.PathLike) -> Iterator[Raster]:
    """Open an image file; raise ImageFileError if it cannot be read."""
    rasterio = _rasterio()
    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), rasterio.open(path) as source:
            yield Raster(source, str(path))
    except rasterio.errors.RasterioError as error:
        reason = "file not found" if not Path(path).is_file() else error
        raise ImageFileError(f"{path}: cannot be read ({reason})") from None


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
    """
    rasterio = _rasterio()
    width, height = like.size
    profile = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": dtype, "nodata": nodata}
    profile |= {"crs": like.source.crs, "transform": like.source.transform}
    profile |= {"compress": "deflate", "BIGTIFF": "IF_SAFER"}
    if min(width, height) >= BLOCK:
        profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    with rasterio.open(path, "w", **profile) as target:
        target.update_tags(TIFFTAG_SOFTWARE=SOFTWARE)
        if colors and dtype == np.uint8:
            target.write_colormap(1, {value: (*color, 255) for value, color in colors.items()})
        yield RasterWriter(target)
