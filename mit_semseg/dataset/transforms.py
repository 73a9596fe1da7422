"""Resize, pad and normalize images and labels. The published weights depend on these numbers."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .classes import IGNORE

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (104.00698793, 116.66876762, 122.67891434)  # ImageNet, BGR in 0..255
NORMALIZATIONS = ("imagenet", "caffe")

FILTERS = ("nearest", "bilinear", "bicubic")


def imresize(im: Image.Image, size: tuple[int, int], interp: str = "bilinear") -> Image.Image:
    """Resize to (width, height) with Pillow. `interp` is nearest, or antialiased bilinear or bicubic."""
    if interp not in FILTERS:
        raise ValueError(f"unknown interp {interp!r}; choose one of {', '.join(FILTERS)}")
    return im.resize(size, Image.Resampling[interp.upper()])


def imresize_fast(im: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB image with PyTorch's antialiased bilinear filter in 8-bit arithmetic.

    Takes a quarter of the time of `imresize`. Pixels differ from it by at most one level.
    """
    # A batch of one whose strides PyTorch recognizes as channels last, so that the result has the same memory format.
    x = torch.from_numpy(np.array(im)).unsqueeze(0).permute(0, 3, 1, 2)
    x = F.interpolate(x, size[::-1], mode="bilinear", antialias=True)
    return Image.fromarray(x[0].permute(1, 2, 0).numpy())


def round_up(x: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `x`."""
    return -(-x // multiple) * multiple


def scale_for(width: int, height: int, short_side: int, max_size: int) -> float:
    """Return the factor that scales the short side to `short_side`, limited to a long side of `max_size`."""
    return min(short_side / min(height, width), max_size / max(height, width))


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize_batch(x: Tensor, kind: str = "imagenet", sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """Normalize RGB images (N, 3, H, W) uint8 on any device to float32 in the same memory format.

    Args:
        kind: 'imagenet' for (RGB / 255 - mean) / std, or 'caffe' for BGR - mean.
        sizes: (height, width) of each image; the padding outside is set to zero. None for images without padding.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {kind!r}; choose one of {', '.join(NORMALIZATIONS)}")
    if kind == "caffe":
        y = x.flip(1).float().sub_(_per_channel(CAFFE_MEAN, x))
    else:
        y = x.float().div_(255).sub_(_per_channel(MEAN, x)).div_(_per_channel(STD, x))
    for image, (height, width) in zip(y, sizes or (), strict=bool(sizes)):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return y


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values).view(3, 1, 1).to(like.device, non_blocking=True)


def normalize(image: Image.Image, kind: str = "imagenet") -> Tensor:
    """Convert an RGB image to (3, H, W) float32, see `normalize_batch`."""
    return normalize_batch(to_uint8_tensor(image)[None], kind)[0].contiguous()


def downsample_label(label: np.ndarray, rate: int) -> np.ndarray:
    """Pad class indices (H, W) to a multiple of `rate` with the ignore index, then sample as Pillow's NEAREST."""
    small = np.full([-(-side // rate) for side in label.shape], IGNORE, label.dtype)
    samples = label[rate // 2 :: rate, rate // 2 :: rate]
    small[: samples.shape[0], : samples.shape[1]] = samples
    return small


def pad_batch(
    images: Sequence[Tensor], labels: Sequence[np.ndarray], multiple: int, rate: int, size: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Pad images (3, h, w), all float32 (normalized) or all uint8, and their labels (h, w) to a common size.

    Args:
        multiple: height and width of the batch are rounded up to a multiple of this.
        rate: downsampling rate of the labels; divides `multiple`.
        size: (height, width) of the batch; None takes the largest image.

    Returns:
        `img_data` (N, 3, H, W), padded with zeros, channels last in memory if uint8; `seg_label`
        (N, H / rate, W / rate) int64, rounded up and padded with the ignore index.
    """
    height, width = size or (round_up(max(x.shape[i] for x in images), multiple) for i in (1, 2))
    memory_format = torch.channels_last if images[0].dtype == torch.uint8 else torch.contiguous_format
    img_data = torch.empty(len(images), 3, height, width, dtype=images[0].dtype, memory_format=memory_format).zero_()
    seg_label = torch.full((len(images), -(-height // rate), -(-width // rate)), IGNORE, dtype=torch.int64)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        img_data[i, :, : image.shape[1], : image.shape[2]] = image
        small = torch.from_numpy(downsample_label(label, rate))
        seg_label[i, : small.shape[0], : small.shape[1]] = small
    return {"img_data": img_data, "seg_label": seg_label}
