"""Convert supported inputs to RGB images, and find the images for `--imgs`."""

import io
import logging
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..dataset.bands import BandImage, Bands
from ..dataset.image_io import as_rgb, read_image
from ..dataset.layouts import VIDEO_ENDINGS, find_files, find_images
from ..lib.utils import UserError, shorten_list
from .raster import is_raster
from .results import check_overwriting, is_output_file, raster_suffixes, unique_stems

logger = logging.getLogger(__name__)


class UnsupportedImageError(UserError, TypeError):
    """An image has an unsupported type, shape, dtype or value range."""


def to_image(source, name: str = "image", bands: Bands | None = None) -> tuple[str, Image.Image | BandImage]:
    """Return the tuple (path, RGB image). If the image has no path, `name` replaces the path.

    Args:
        source: a path; the bytes of an image file; a PIL image; an array (H, W, 3) or (H, W) uint8; or a tensor
            (3, H, W), uint8 or floating point in 0..1.
        name: see above.
        bands: for networks with DATASET.mean; then `source` is a path or an array (H, W, channels), and the result
            contains a `BandImage`.

    Raises:
        ImageFileError: the file is missing or cannot be decoded.
        UnsupportedImageError: the type, shape, dtype or value range is not supported.
    """
    if isinstance(source, (str, Path)):
        if str(source).startswith(("http://", "https://")):
            raise UnsupportedImageError(f"{source}: URLs are not supported; download the file and pass its path")
        return str(source), bands.read(source) if bands else read_image(source)
    if bands:
        if not isinstance(source, np.ndarray):
            kind = type(source).__name__
            raise UnsupportedImageError(f"got {kind}; a network with DATASET.mean needs a path or an array (H, W, C)")
        return name, bands.from_array(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return name, read_image(io.BytesIO(source), f"{name} ({len(source)} bytes)")
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or name, as_rgb(source, name)
    pixels = None
    if isinstance(source, torch.Tensor):
        x = source.detach().cpu()
        if x.is_floating_point():
            if x.numel() and not (x.min() >= 0 and x.max() <= 1):
                raise UnsupportedImageError(
                    f"got a tensor with values {x.min():g}..{x.max():g}, expected 0..1; do not normalize the image"
                )
            x = (x * 255).round().to(torch.uint8)
        if x.dim() == 3 and len(x) == 3:
            pixels = x.permute(1, 2, 0).numpy()
    elif isinstance(source, np.ndarray) and (source.ndim == 2 or source.shape[2:] == (3,)):
        pixels = source
    if pixels is not None and pixels.dtype == np.uint8 and pixels.size:
        return name, Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    kind = f"shape {tuple(source.shape)}, dtype {source.dtype}" if hasattr(source, "shape") else type(source).__name__
    raise UnsupportedImageError(
        f"got {kind}; expected a path, bytes, a PIL image, an array (H, W, 3) or (H, W) uint8 in RGB order, or a "
        "tensor (3, H, W), uint8 or floating point in 0..1"
    )


def find_inputs(pattern: str, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return a dict from image paths to output paths without suffix. No output file belongs to two images.

    In folders and glob patterns, videos and output files of earlier runs are skipped.

    Args:
        pattern: value of `--imgs`: an image, a folder (searched recursively), or a glob pattern.
        folder: output folder. Subfolders of the input folder are created in it.
        suffixes: suffixes of the output files, see `Result.save_as`.

    Raises:
        UserError: no images were found, or an output would overwrite a file that this program has not written.
    """
    path = Path(pattern)
    if path.is_file():
        base, images = path.parent, [path]
    elif path.is_dir():
        base, images = path, _keep_images([*find_images(path), *find_files(path, VIDEO_ENDINGS)])
    elif has_magic(pattern):
        base = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        images = _keep_images([p for p in map(Path, sorted(glob(pattern, recursive=True))) if p.is_file()])
    else:
        raise UserError(f"--imgs {pattern} does not exist; give an image, a folder or a glob pattern")
    if not images:
        raise UserError(f"no images found for --imgs {pattern}")
    stems = unique_stems([str(p.relative_to(base)) for p in images])
    outputs = {str(p): folder / stems[str(p.relative_to(base))] for p in images}
    for image, stem in outputs.items():
        endings = raster_suffixes(suffixes) if is_raster(image) else suffixes
        check_overwriting(image, [Path(f"{stem}{suffix}") for suffix in endings])
    return outputs


def _keep_images(files: Sequence[Path]) -> list[Path]:
    """Return the files that are neither videos nor output files of earlier runs; log the skipped files."""
    videos = [path for path in files if path.suffix.lower() in VIDEO_ENDINGS]
    images = [path for path in files if path.suffix.lower() not in VIDEO_ENDINGS and not is_output_file(path)]
    if results := len(files) - len(videos) - len(images):
        logger.info("skipped %d output files of earlier runs", results)
    if videos:
        names = shorten_list([str(path) for path in videos], 3)
        logger.warning("skipped %d videos (%s); segment them separately, e.g. --imgs %s", len(videos), names, videos[0])
    return images
