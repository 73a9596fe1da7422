"""Resizing, padding and normalizing: pure functions on images and labels.

The published weights rely on these numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .classes import IGNORE

MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1 over ImageNet
STD = (0.229, 0.224, 0.225)

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def imresize(im: Image.Image, size: tuple[int, int], interp: str = "bilinear") -> Image.Image:
    """Resize with Pillow (antialiased but for nearest).

    Args:
        im: any picture.
        size: (width, height).
        interp: 'nearest', 'bilinear' or 'bicubic'.

    Raises:
        ValueError: another `interp`.
    """
    if interp not in _FILTERS:
        raise ValueError(f"interp {interp!r}: choose one of {', '.join(_FILTERS)}")
    return im.resize(size, _FILTERS[interp])


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least `x`."""
    return -(-x // multiple) * multiple


def scale_for(width: int, height: int, short_side: int, max_size: int) -> float:
    """Factor that brings the short side to `short_side`, or the long side to `max_size` if that is less."""
    return min(short_side / min(height, width), max_size / max(height, width))


def normalize(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, per channel (value / 255 - mean) / std."""
    x = torch.from_numpy(np.array(image, np.float32).transpose(2, 0, 1) / np.float32(255))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return x.sub_(mean).div_(std).contiguous()


def scale_pyramid(image: Image.Image, short_sides: Sequence[int], max_size: int, multiple: int) -> list[Tensor]:
    """One normalized (1, 3, h, w) tensor per short side, both sides rounded up to a multiple.

    Args:
        image: RGB picture.
        short_sides: wanted short sides, pixels.
        max_size: limit of the long side before rounding.
        multiple: of the sides.
    """
    width, height = image.size
    tensors = []
    for short_side in short_sides:
        scale = scale_for(width, height, short_side, max_size)
        target = [round_up(max(1, int(side * scale)), multiple) for side in (width, height)]
        tensors.append(normalize(imresize(image, tuple(target), "bilinear")).unsqueeze(0))
    return tensors


def train_pair(
    image: Image.Image, label: Image.Image, *, short_side: int, max_size: int, flip: bool
) -> tuple[Image.Image, Image.Image]:
    """Mirror and scale a picture and its raw label; the sides are cut to whole pixels, not rounded."""
    if flip:
        image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
    scale = scale_for(*image.size, short_side, max_size)
    size = tuple(max(1, int(side * scale)) for side in image.size)
    return imresize(image, size, "bilinear"), imresize(label, size, "nearest")


def downsample_label(label: np.ndarray, rate: int) -> np.ndarray:
    """Nearest sampling of class indices (H, W) by `rate`, after padding with the ignore label to a multiple of it.

    Takes the pixel that Pillow's NEAREST takes: the one at the centre of each cell.
    """
    height, width = label.shape
    pad = ((0, round_up(height, rate) - height), (0, round_up(width, rate) - width))
    return np.pad(label, pad, constant_values=IGNORE)[rate // 2 :: rate, rate // 2 :: rate]


def pad_batch(images: Sequence[Tensor], labels: Sequence[np.ndarray], multiple: int, rate: int) -> dict[str, Tensor]:
    """Stack pictures and labels of different sizes.

    Args:
        images: (3, h, w) each.
        labels: (h, w) class indices at the pictures' resolution.
        multiple: the batch's height and width are rounded up to a multiple of this.
        rate: labels are sampled down by this; divides `multiple`.

    Returns:
        `img_data` (N, 3, H, W), padded with zeros (the mean colour); `seg_label` (N, H / rate, W / rate) int64, padded
        with the ignore label.
    """
    height = round_up(max(x.shape[1] for x in images), multiple)
    width = round_up(max(x.shape[2] for x in images), multiple)
    img_data = torch.zeros(len(images), 3, height, width)
    seg_label = torch.full((len(images), height // rate, width // rate), IGNORE, dtype=torch.int64)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        img_data[i, :, : image.shape[1], : image.shape[2]] = image
        small = torch.from_numpy(downsample_label(label, rate))
        seg_label[i, : small.shape[0], : small.shape[1]] = small
    return {"img_data": img_data, "seg_label": seg_label}
