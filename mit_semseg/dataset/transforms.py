"""Resizing, padding and normalizing: pure functions on images and labels.

The published weights rely on these numbers. What only varies the training pictures is in `augment.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
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


def imresize_fast(im: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`imresize` of an RGB picture in a quarter of the time: the same antialiased bilinear filter in PyTorch's 8-bit
    arithmetic, whose result differs by one grey level here and there.

    Args:
        im: RGB picture.
        size: (width, height).
    """
    # A batch of one, in a memory order that PyTorch knows as channels last: then its result has it, too.
    x = torch.from_numpy(np.array(im)).unsqueeze(0).permute(0, 3, 1, 2)
    x = F.interpolate(x, size[::-1], mode="bilinear", antialias=True)
    return Image.fromarray(x[0].permute(1, 2, 0).numpy())


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least `x`."""
    return -(-x // multiple) * multiple


def scale_for(width: int, height: int, short_side: int, max_size: int) -> float:
    """Factor that brings the short side to `short_side`, or the long side to `max_size` if that is less."""
    return min(short_side / min(height, width), max_size / max(height, width))


def as_bytes(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalized(x: Tensor, kind: str = "imagenet", sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """Pictures as a network takes them, the same on every device.

    Args:
        x: (N, 3, H, W) uint8 RGB.
        kind: 'imagenet', per channel (value / 255 - mean) / std; or 'caffe', channels in the order BGR, value - mean.
        sizes: (height, width) of every picture; beyond it everything becomes zero, the mean colour. None: all of it.

    Returns:
        (N, 3, H, W) float32, in the memory order of `x`.

    Raises:
        ValueError: another kind.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"normalization {kind!r}: choose one of {', '.join(NORMALIZATIONS)}")
    if kind == "caffe":
        y = x.flip(1).float().sub_(_per_channel(CAFFE_MEAN, x))
    else:
        y = x.float().div_(255).sub_(_per_channel(MEAN, x)).div_(_per_channel(STD, x))
    for picture, (height, width) in zip(y, sizes or (), strict=bool(sizes)):
        picture[:, height:] = 0
        picture[:, :, width:] = 0
    return y


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values).view(3, 1, 1).to(like.device, non_blocking=True)


def normalize(image: Image.Image, kind: str = "imagenet") -> Tensor:
    """RGB picture -> (3, H, W) float32, see `normalized`."""
    return normalized(as_bytes(image)[None], kind)[0].contiguous()


def scale_pyramid(
    image: Image.Image,
    short_sides: Sequence[int],
    max_size: int,
    multiple: int,
    normalization: str | None = "imagenet",
    *,
    fast: bool = False,
) -> list[Tensor]:
    """One normalized (1, 3, h, w) tensor per short side, both sides rounded up to a multiple.

    Args:
        image: RGB picture.
        short_sides: wanted short sides, pixels.
        max_size: limit of the long side before rounding.
        multiple: of the sides.
        normalization: see `normalized`; None leaves it to later, and the tensors are uint8.
        fast: resize by `imresize_fast`.
    """
    width, height = image.size
    tensors = []
    for short_side in short_sides:
        scale = scale_for(width, height, short_side, max_size)
        target = [round_up(max(1, int(side * scale)), multiple) for side in (width, height)]
        small = (imresize_fast if fast else imresize)(image, tuple(target))
        tensors.append((normalize(small, normalization) if normalization else as_bytes(small)).unsqueeze(0))
    return tensors


def train_pair(
    image: Image.Image, label: Image.Image, *, scale: float, flip: bool, fast: bool = False
) -> tuple[Image.Image, Image.Image]:
    """Mirror and scale a picture and its raw label; the sides are cut to whole pixels, not rounded.

    Args:
        fast: resize by `imresize_fast`.
    """
    if flip:
        image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
    size = tuple(max(1, int(side * scale)) for side in image.size)
    return (imresize_fast if fast else imresize)(image, size), imresize(label, size, "nearest")


def downsample_label(label: np.ndarray, rate: int) -> np.ndarray:
    """Nearest sampling of class indices (H, W) by `rate`, after padding with the ignore label to a multiple of it.

    Takes the pixel that Pillow's NEAREST takes: the one at the centre of each cell.
    """
    small = np.full([-(-side // rate) for side in label.shape], IGNORE, label.dtype)
    inside = label[rate // 2 :: rate, rate // 2 :: rate]
    small[: inside.shape[0], : inside.shape[1]] = inside
    return small


def pad_batch(
    images: Sequence[Tensor],
    labels: Sequence[np.ndarray],
    multiple: int,
    rate: int,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Stack pictures and labels of different sizes.

    Args:
        images: (3, h, w) each, normalized or all of uint8.
        labels: (h, w) class indices at the pictures' resolution.
        multiple: the batch's height and width are rounded up to a multiple of this.
        rate: labels are sampled down by this; divides `multiple`.
        size: (height, width) of the batch, for crops; None takes what the pictures need.

    Returns:
        `img_data` (N, 3, H, W), padded with zeros (the mean colour of normalized ones), of uint8 channels last in
        memory; `seg_label` (N, H / rate, W / rate) int64, rounded up, padded with the ignore label.
    """
    height, width = size or (round_up(max(x.shape[i] for x in images), multiple) for i in (1, 2))
    raw = images[0].dtype == torch.uint8
    order = torch.channels_last if raw else torch.contiguous_format
    img_data = torch.empty(len(images), 3, height, width, dtype=images[0].dtype, memory_format=order).zero_()
    seg_label = torch.full((len(images), -(-height // rate), -(-width // rate)), IGNORE, dtype=torch.int64)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        img_data[i, :, : image.shape[1], : image.shape[2]] = image
        small = torch.from_numpy(downsample_label(label, rate))
        seg_label[i, : small.shape[0], : small.shape[1]] = small
    return {"img_data": img_data, "seg_label": seg_label}
