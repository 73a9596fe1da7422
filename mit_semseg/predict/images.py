"""Finding the pictures that are to be segmented, wherever they come from, and where their results go."""

import io
import logging
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..dataset.image_io import STANDARD_LIMITS, ImageLimits, as_rgb, read_image
from ..dataset.layouts import VIDEO_ENDINGS, find_files, find_images
from ..lib.utils import UserError, shorten
from .results import named, refuse_overwriting
from .visualize import is_result, result_stems

logger = logging.getLogger(__name__)


class UnsupportedImageError(UserError, TypeError):
    """Something that is no picture; the message says what was given and what is taken."""


def to_image(given, name: str = "picture", limits: ImageLimits = STANDARD_LIMITS) -> tuple[str, Image.Image]:
    """A name and an RGB picture, from whatever holds one.

    Args:
        given: a path; the bytes of an image file; a PIL image; an array (H, W, 3) or (H, W) uint8; or a tensor
            (3, H, W), uint8 or floating point in 0..1.
        name: of what has none.
        limits: of files.

    Raises:
        ImageFileError: a file that is no readable image, or above the limits.
        UnsupportedImageError: anything else.
    """
    if isinstance(given, (str, Path)):
        if str(given).startswith(("http://", "https://")):
            raise UnsupportedImageError(
                f"{given}: addresses are not fetched; download the picture and give its path or bytes"
            )
        return str(given), read_image(given, limits=limits)
    if isinstance(given, (bytes, bytearray, memoryview)):
        return name, read_image(io.BytesIO(given), f"{name} ({len(given)} bytes)", limits=limits)
    if isinstance(given, Image.Image):
        return getattr(given, "filename", "") or name, as_rgb(given, name)
    if isinstance(given, torch.Tensor):
        return name, Image.fromarray(_pixels_of(given))
    if isinstance(given, np.ndarray):
        if given.dtype == np.uint8 and given.size and (given.ndim == 2 or (given.ndim == 3 and given.shape[2] == 3)):
            return name, Image.fromarray(np.ascontiguousarray(given)).convert("RGB")
        raise UnsupportedImageError(
            f"an array {given.shape} of {given.dtype} is no picture: give (H, W, 3) uint8 in RGB, or (H, W) in grey"
        )
    raise UnsupportedImageError(
        f"{type(given).__name__} is no picture: give a path, bytes, a PIL image, an array (H, W, 3) uint8 or a tensor"
    )


def _pixels_of(x: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a tensor."""
    x = x.detach().cpu()
    fits = x.dim() == 3 and x.size(0) == 3 and x.numel()
    if not fits or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise UnsupportedImageError(
            f"a tensor {tuple(x.shape)} of {x.dtype} is no picture: give (3, H, W), uint8 or floating point in 0..1"
        )
    if x.is_floating_point():
        if not (x.min() >= 0 and x.max() <= 1):
            raise UnsupportedImageError(
                f"the tensor has values from {x.min():g} to {x.max():g}: pictures of floating point have 0 to 1, not "
                f"normalized ones"
            )
        x = (x * 255).round().to(torch.uint8)
    return x.permute(1, 2, 0).contiguous().numpy()


def find_inputs(given: str, result: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Pictures that `--imgs` names, and for each the path without extension of its results.

    Args:
        given: a file, a folder (searched recursively, any type Pillow reads), or a glob. Results of earlier runs and
            videos in a folder or glob are left out; the log names the videos.
        result: folder of the results.
        endings: what will be written for every picture, e.g. `(".png", ".json")`.

    Returns:
        {picture: stem}; folders below the given one are kept, and no two results have the same name.

    Raises:
        UserError: nothing there, or something would be written over that is no result.
    """
    path = Path(given)
    if path.is_file():
        base, found = path.parent, [path]
    elif path.is_dir() or has_magic(given):
        base = path if path.is_dir() else Path(*_fixed_parts(path))
        matches = find_images(path) if path.is_dir() else sorted(Path(p) for p in glob(given, recursive=True))
        files = [p for p in matches if p.is_file()]
        videos = find_files(path, VIDEO_ENDINGS) if path.is_dir() else _videos(files)
        found = [p for p in files if p not in videos and not is_result(p)]
        if any(map(is_result, files)):
            logger.info("%d results of earlier runs left out", sum(map(is_result, files)))
        if videos:
            names = shorten([str(p) for p in videos], 3)
            logger.warning("%d videos left out, give each by itself (--imgs %s): %s", len(videos), videos[0], names)
    else:
        raise UserError(f"--imgs {given}: there is no such file or folder")
    if not found:
        raise UserError(f"--imgs {given}: no pictures there")
    names = result_stems([str(p.relative_to(base)) for p in found])
    plan = {str(p): result / names[str(p.relative_to(base))] for p in found}
    for picture, stem in plan.items():
        refuse_overwriting(picture, [named(stem, ending) for ending in endings])
    return plan


def _videos(files: Sequence[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in VIDEO_ENDINGS]


def _fixed_parts(pattern: Path) -> tuple[str, ...]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return parts[:first]
