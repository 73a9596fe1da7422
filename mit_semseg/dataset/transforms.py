"""Resizing, padding and normalizing: pure functions on images and labels.

The published weights rely on these numbers. What only varies the training pictures is in `augment.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .classes import IGNORE

MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1 over ImageNet
STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (104.00698793, 116.66876762, 122.67891434)  # of BGR in 0..255 over ImageNet, as Caffe's networks take it
NORMALIZATIONS = ("imagenet", "caffe")

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


def normalize(image: Image.Image, kind: str = "imagenet") -> Tensor:
    """RGB picture -> (3, H, W) float32.

    Args:
        image: RGB picture.
        kind: 'imagenet', per channel (value / 255 - mean) / std; or 'caffe', channels in the order BGR, value - mean.

    Raises:
        ValueError: another kind.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"normalization {kind!r}: choose one of {', '.join(NORMALIZATIONS)}")
    x = torch.from_numpy(np.array(image, np.float32).transpose(2, 0, 1))
    if kind == "caffe":
        return x.flip(0).sub_(torch.tensor(CAFFE_MEAN).view(3, 1, 1)).contiguous()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return x.div_(255).sub_(mean).div_(std).contiguous()


def scale_pyramid(
    image: Image.Image, short_sides: Sequence[int], max_size: int, multiple: int, normalization: str = "imagenet"
) -> list[Tensor]:
    """One normalized (1, 3, h, w) tensor per short side, both sides rounded up to a multiple.

    Args:
        image: RGB picture.
        short_sides: wanted short sides, pixels.
        max_size: limit of the long side before rounding.
        multiple: of the sides.
        normalization: see `normalize`.
    """
    width, height = image.size
    tensors = []
    for short_side in short_sides:
        scale = scale_for(width, height, short_side, max_size)
        target = [round_up(max(1, int(side * scale)), multiple) for side in (width, height)]
        tensors.append(normalize(imresize(image, tuple(target), "bilinear"), normalization).unsqueeze(0))
    return tensors


def train_pair(image: Image.Image, label: Image.Image, *, scale: float, flip: bool) -> tuple[Image.Image, Image.Image]:
    """Mirror and scale a picture and its raw label; the sides are cut to whole pixels, not rounded."""
    if flip:
        image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
    size = tuple(max(1, int(side * scale)) for side in image.size)
    return imresize(image, size, "bilinear"), imresize(label, size, "nearest")


def downsample_label(label: np.ndarray, rate: int) -> np.ndarray:
    """Nearest sampling of class indices (H, W) by `rate`, after padding with the ignore label to a multiple of it.

    Takes the pixel that Pillow's NEAREST takes: the one at the centre of each cell.
    """
    height, width = label.shape
    pad = ((0, round_up(height, rate) - height), (0, round_up(width, rate) - width))
    return np.pad(label, pad, constant_values=IGNORE)[rate // 2 :: rate, rate // 2 :: rate]


def pad_batch(
    images: Sequence[Tensor],
    labels: Sequence[np.ndarray],
    multiple: int,
    rate: int,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Stack pictures and labels of different sizes.

    Args:
        images: (3, h, w) each.
        labels: (h, w) class indices at the pictures' resolution.
        multiple: the batch's height and width are rounded up to a multiple of this.
        rate: labels are sampled down by this; divides `multiple`.
        size: (height, width) of the batch, for crops; None takes what the pictures need.

    Returns:
        `img_data` (N, 3, H, W), padded with zeros (the mean colour); `seg_label` (N, H / rate, W / rate) int64, rounded
        up, padded with the ignore label.
    """
    height, width = size or (round_up(max(x.shape[i] for x in images), multiple) for i in (1, 2))
    img_data = torch.zeros(len(images), 3, height, width)
    seg_label = torch.full((len(images), -(-height // rate), -(-width // rate)), IGNORE, dtype=torch.int64)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        img_data[i, :, : image.shape[1], : image.shape[2]] = image
        small = torch.from_numpy(downsample_label(label, rate))
        seg_label[i, : small.shape[0], : small.shape[1]] = small
    return {"img_data": img_data, "seg_label": seg_label}
