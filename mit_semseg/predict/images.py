"""Convert supported inputs to RGB images, and find the images that `--imgs` names."""

import io
import logging
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..dataset.image_io import as_rgb, read_image
from ..dataset.layouts import VIDEO_ENDINGS, find_files, find_images
from ..lib.utils import UserError, shorten_list
from .results import add_suffix, check_overwriting, is_result, unique_stems

logger = logging.getLogger(__name__)


class UnsupportedImageError(UserError, TypeError):
    """Unsupported image input."""


def to_image(source, name: str = "image") -> tuple[str, Image.Image]:
    """Return the name and the RGB image of a source.

    Args:
        source: a path; the bytes of an image file; a PIL image; an array (H, W, 3) or (H, W) uint8; or a tensor
            (3, H, W), uint8 or floating point in 0..1.
        name: used if the source has no path.

    Raises:
        ImageFileError: the file is missing or cannot be decoded.
        UnsupportedImageError: unsupported type, shape, dtype or range.
    """
    if isinstance(source, (str, Path)):
        if str(source).startswith(("http://", "https://")):
            raise UnsupportedImageError(f"{source}: URLs are not supported; download the file and pass its path")
        return str(source), read_image(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return name, read_image(io.BytesIO(source), f"{name} ({len(source)} bytes)")
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or name, as_rgb(source, name)
    if isinstance(source, torch.Tensor):
        return name, Image.fromarray(_tensor_to_array(source))
    if isinstance(source, np.ndarray):
        if source.dtype == np.uint8 and source.size and (source.ndim == 2 or source.shape[2:] == (3,)):
            return name, Image.fromarray(np.ascontiguousarray(source)).convert("RGB")
        raise UnsupportedImageError(
            f"got an array {source.shape} of {source.dtype}; expected uint8 of shape (H, W, 3) in RGB order, or (H, W)"
        )
    raise UnsupportedImageError(
        f"got {type(source).__name__}; expected a path, bytes, a PIL image, an array (H, W, 3) uint8 or a tensor"
    )


def _tensor_to_array(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    if x.dim() != 3 or x.size(0) != 3 or not x.numel() or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise UnsupportedImageError(
            f"got a tensor {tuple(x.shape)} of {x.dtype}; expected (3, H, W), uint8 or floating point in 0..1"
        )
    if x.is_floating_point():
        if not (x.min() >= 0 and x.max() <= 1):
            raise UnsupportedImageError(
                f"got a floating point tensor with values {x.min():g}..{x.max():g}; expected 0..1, before normalization"
            )
        x = (x * 255).round().to(torch.uint8)
    return x.permute(1, 2, 0).contiguous().numpy()


def find_inputs(pattern: str, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Find the images that `--imgs` names, and choose the output path of each.

    Results of earlier runs are skipped; so are videos, with a warning.

    Args:
        pattern: an image, a folder (searched recursively for all formats that Pillow reads), or a glob pattern.
        folder: output folder; subfolders below `pattern` are kept.
        suffixes: suffixes of the files to be written, see `Result.save_as`.

    Returns:
        {image path: output path without suffix}; no two images share an output file.

    Raises:
        UserError: no image is found, or an output file exists that is not a result.
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
        raise UserError(f"--imgs {pattern}: no such file or folder")
    if not images:
        raise UserError(f"--imgs {pattern}: no images found")
    stems = unique_stems([str(p.relative_to(base)) for p in images])
    outputs = {str(p): folder / stems[str(p.relative_to(base))] for p in images}
    for image, stem in outputs.items():
        check_overwriting(image, [add_suffix(stem, suffix) for suffix in suffixes])
    return outputs


def _keep_images(files: Sequence[Path]) -> list[Path]:
    """Skip videos and the results of earlier runs, and log them."""
    videos = [path for path in files if path.suffix.lower() in VIDEO_ENDINGS]
    images = [path for path in files if path.suffix.lower() not in VIDEO_ENDINGS and not is_result(path)]
    if results := len(files) - len(videos) - len(images):
        logger.info("skipped %d results of earlier runs", results)
    if videos:
        names = shorten_list([str(path) for path in videos], 3)
        logger.warning("skipped %d videos; pass them one by one (--imgs %s): %s", len(videos), videos[0], names)
    return images
