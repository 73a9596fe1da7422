"""Segment images that do not fit into memory, window by window, and keep their georeference.

The images are not resized: one pixel of the file is one pixel for the network. Results are TIFF files.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..dataset import ClassTable
from ..dataset.bands import Bands
from ..dataset.classes import IGNORE
from ..dataset.image_io import ImageFileError
from ..dataset.rasters import Raster, create_raster, is_tiff, open_raster
from ..dataset.transforms import normalize_batch, round_up
from ..evaluation import Predictor
from ..evaluation.label_map import labels_of_strip
from ..lib.utils import UserError, atomic_write
from .results import check_ignored_value, check_overwriting

WINDOW = 512  # side of sliding windows if INFERENCE.window_size is 0
ROWS = 512  # number of rows that are written at once
GEO_TAGS = 33550, 34264, 34735  # TIFF tags of a georeference
TILE_TAG, ORIENTATION_TAG = 322, 274  # TIFF tags of tiled files, and of the EXIF orientation


def is_raster(path: str | os.PathLike) -> bool:
    """Return whether an image is segmented window by window.

    If rasterio is installed, this applies to images with more pixels than Pillow decodes, and to TIFF files that are
    tiled or georeferenced.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the number of pixels, and about truncated files
            with Image.open(path) as image:
                tags = getattr(image, "tag_v2", ())
    except Image.DecompressionBombError:
        return find_spec("rasterio") is not None
    except (OSError, SyntaxError, ValueError):  # not an image, or a TIFF file that Pillow does not support
        tags = None
    if not is_tiff(path) or find_spec("rasterio") is None:
        return False
    if tags is not None:
        return any(tag in tags for tag in (TILE_TAG, *GEO_TAGS)) and dict(tags).get(ORIENTATION_TAG, 1) == 1
    try:
        with open_raster(path) as raster:
            return raster.is_windowed
    except ImageFileError:
        return False


class _Output(NamedTuple):
    """Content of an output file."""

    dtype: np.dtype
    nodata: int | None  # value of pixels without data
    colors: dict[int, list[int]]  # value -> (R, G, B)
    render: Callable[["_Block"], np.ndarray]  # returns the values (n, W)


class _Block(NamedTuple):
    """Results of some rows."""

    labels: np.ndarray  # (n, W) int16 class indices
    confidence: np.ndarray  # (n, W) uint8, 255 is 100 %
    unsure: np.ndarray  # (n, W) bool, confidence below the minimum

    def rows(self, rows: slice, columns: slice = slice(None)) -> "_Block":
        return _Block(*(array[rows, columns] for array in self))


class WindowReader:
    """A normalized image (1, C, H, W) that is read window by window, `reader[..., rows, columns]`.

    Args:
        raster: the image file.
        device: device of the windows.
        bands: normalization; None: 8-bit RGB (the first three channels of the file).
        normalization: see `normalize_batch`; without `bands`.
        multiple: H and W are rounded up to a multiple of this number; the added pixels are zero.
    """

    def __init__(self, raster: Raster, device: torch.device, bands: Bands | None, normalization: str, multiple: int):
        self.raster, self.device, self.bands, self.normalization = raster, device, bands, normalization
        width, height = (round_up(side, multiple) for side in raster.size)
        self.shape = torch.Size((1, len(bands.mean) if bands else 3, height, width))

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __getitem__(self, index: tuple) -> Tensor:
        _, rows, columns = index
        x = self._read(rows, columns)
        return F.pad(x, (0, columns.stop - columns.start - x.size(3), 0, rows.stop - rows.start - x.size(2)))

    def _read(self, rows: slice, columns: slice) -> Tensor:
        """Return the pixels of a window that are inside the image."""
        if self.bands:
            pixels = self.raster.read_with_nan(rows, columns)
            return self.bands.from_array(pixels, self.raster.name).to_tensor()[None].to(self.device)
        x = torch.from_numpy(self.raster.read_rgb(rows, columns)).permute(2, 0, 1)[None].to(self.device)
        return normalize_batch(x, self.normalization)


def segment_raster(
    predictor: Predictor,
    path: str | os.PathLike,
    stem: str | os.PathLike,
    table: ClassTable,
    *,
    bands: Bands | None,
    normalization: str,
    multiple: int,
    suffixes: Sequence[str],
    min_confidence: float = 0.0,
) -> list[Path]:
    """Segment an image file in bounded memory; write TIFF files with its georeference, and return their paths.

    Args:
        predictor: network; the size and overlap of the windows are those of its options.
        path: image file.
        stem: path of the results, without suffix.
        table: class names and colors.
        bands, normalization, multiple: see `WindowReader`.
        suffixes: `_index.tif` (class indices), `_label.tif` (label values) and `_confidence.tif` (255 is 100 %). Pixels
            without data in the image have the class index 255 (65535 for more than 255 classes), the ignored label
            value if there is one, and confidence 0.
        min_confidence: pixels with a smaller confidence get the ignored label value in `_label.tif`.

    Raises:
        ImageFileError: the file cannot be read, or the type of its pixels is not supported.
        UserError: a result would overwrite another file, or `min_confidence` needs an ignored label value.
        WriteError: a result cannot be written.
    """
    paths = [Path(f"{stem}{suffix}") for suffix in suffixes]
    check_overwriting(str(path), paths)
    if min_confidence:
        check_ignored_value(table)
    outputs = [_make_output(suffix, table) for suffix in suffixes]
    with ExitStack() as stack:
        raster = stack.enter_context(open_raster(path))
        width, height = raster.size
        targets = []
        for output, target in zip(outputs, paths, strict=True):
            partial = stack.enter_context(atomic_write(target))
            options = {"dtype": output.dtype, "nodata": output.nodata, "colors": output.colors}
            targets.append(stack.enter_context(create_raster(partial, raster, **options)))
        reader, top = WindowReader(raster, predictor.device, bands, normalization, multiple), 0
        window = predictor.options.window_size or (round_up(WINDOW, multiple),) * 2
        strips = predictor.window_strips([reader], reader.shape[2:], window)
        for block in _blocks(strips, reader.shape[3], min_confidence):
            if top >= height:  # only padding is left
                break
            rows = slice(top, min(top + len(block.labels), height))
            inside = block.rows(slice(0, rows.stop - rows.start), slice(0, width))
            valid = raster.valid(rows)
            for output, target in zip(outputs, targets, strict=True):
                values = output.render(inside)
                masked = valid is not None and output.nodata is not None
                target.write(np.where(valid, values, output.nodata) if masked else values, rows)
            top += len(block.labels)
    return paths


def _blocks(strips: Iterator[Tensor], width: int, min_confidence: float) -> Iterator[_Block]:
    """Join strips of probabilities (C, n, W) to blocks of `ROWS` rows.

    The arrays are used again for the next block. Separate arrays for every strip would fragment the memory.
    """
    block, filled = _Block(*(np.empty((ROWS, width), dtype) for dtype in (np.int16, np.uint8, np.bool_))), 0
    for strip in strips:
        while strip.size(1):
            part, strip = strip[:, : ROWS - filled], strip[:, ROWS - filled :]
            rows, confidence = block.rows(slice(filled, filled + part.size(1))), part.amax(0)
            rows.labels[:] = labels_of_strip(part).cpu().numpy()
            rows.confidence[:] = confidence.mul(255).round().to(torch.uint8).cpu().numpy()
            rows.unsure[:] = (confidence < min_confidence).cpu().numpy()
            filled += part.size(1)
            if filled == ROWS:
                yield block
                filled = 0
    if filled:
        yield block.rows(slice(filled))


def _make_output(suffix: str, table: ClassTable) -> _Output:
    if suffix == "_confidence.tif":
        return _Output(np.dtype(np.uint8), 0, {}, lambda block: block.confidence)
    if suffix == "_index.tif":
        dtype = np.dtype(np.uint8 if len(table) < 256 else np.uint16)
        colors = dict(enumerate(table.colors.tolist()))
        return _Output(dtype, np.iinfo(dtype).max, colors, lambda block: block.labels)
    if table.color_labels:
        raise UserError("--labels does not support large images with DATASET.label_format colors; use --index")

    def decode(block: _Block) -> np.ndarray:
        return table.decode(np.where(block.unsure, IGNORE, block.labels.astype(np.int64)))

    colors = dict(zip(table.raw.tolist(), table.colors.tolist(), strict=True))
    return _Output(table.decode(np.zeros((1, 1), np.int64)).dtype, table.ignored_value, colors, decode)
