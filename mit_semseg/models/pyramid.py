"""The convolution over a feature map and the pooled maps of a pyramid, without the pooled maps at full size.

The pooled maps of pyramid pooling have 1 + 4 + 9 + 36 positions in all. Resizing them and the convolution over the
result are both linear, so together they are one small matrix product: the taps of the convolution applied to the 50
vectors, times a matrix that says how much of every position and tap arrives at every output pixel. It depends on the
sizes alone.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import resize

FEWEST_PIXELS = 64  # of a feature map for which folding pays: below, the 50 positions are as many as the pixels
CACHED_SIZES = 8  # matrices that are kept: a few sizes of pictures come again and again


def through_pyramid(layers: nn.Sequential, x: Tensor, pooled: Sequence[Tensor], **options) -> Tensor:
    """`layers(cat([x, *resized pooled maps]))`, where the first layer is a convolution: see `conv_over_pyramid`."""
    conv, *rest = layers
    x = conv_over_pyramid(conv, x, pooled, **options)
    for layer in rest:
        x = layer(x)
    return x


def conv_over_pyramid(
    conv: nn.Conv2d, x: Tensor, pooled: Sequence[Tensor], *, align_corners: bool = False, pooled_first: bool = False
) -> Tensor:
    """`conv(cat([x, *resized pooled maps]))`, up to rounding.

    Args:
        conv: over all channels, stride 1, "same" padding with zeros.
        x: (N, C, h, w).
        pooled: (N, c, b, b) each, any b.
        align_corners: of the bilinear resize.
        pooled_first: the concatenation begins with the pooled maps.

    Returns:
        (N, conv.out_channels, h, w).
    """
    if x.size(-2) * x.size(-1) < FEWEST_PIXELS:
        return conv_over_resized(conv, x, pooled, align_corners=align_corners, pooled_first=pooled_first)
    channels = [t.size(1) for t in pooled]
    parts = conv.weight.split([*channels, x.size(1)] if pooled_first else [x.size(1), *channels], dim=1)
    own, folded = (parts[-1], parts[:-1]) if pooled_first else (parts[0], parts[1:])
    taps = [
        torch.einsum("ocij,ncp->nopij", weight, t.flatten(2)) for weight, t in zip(folded, pooled, strict=True)
    ]  # (N, out, positions, k, k)
    sizes = tuple(tuple(t.shape[-2:]) for t in pooled)
    arrive = _arrivals(sizes, tuple(x.shape[-2:]), conv.kernel_size, align_corners, conv.weight.dtype, x.device)
    spread = (torch.cat(taps, dim=2).flatten(2) @ arrive).view(x.size(0), -1, *x.shape[-2:])
    return F.conv2d(x, own, conv.bias, padding=conv.padding, dilation=conv.dilation) + spread


def conv_over_resized(
    conv: nn.Conv2d, x: Tensor, pooled: Sequence[Tensor], *, align_corners: bool = False, pooled_first: bool = False
) -> Tensor:
    """The definition of `conv_over_pyramid`: resize, concatenate, convolve."""
    resized = [resize(t, x.shape[-2:], align_corners=align_corners) for t in pooled]
    return conv(torch.cat([*resized, x] if pooled_first else [x, *resized], dim=1))


@lru_cache(maxsize=CACHED_SIZES)
def _arrivals(
    sizes: tuple[tuple[int, int], ...],
    target: tuple[int, int],
    kernel: tuple[int, int],
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """How much of every position and tap arrives at every output pixel: (positions * taps, h * w)."""
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be used in training
        rows = []
        for height, width in sizes:
            positions = height * width
            unit = torch.eye(positions, dtype=dtype, device=device).view(positions, 1, height, width)
            shown = resize(unit, target, align_corners=align_corners)
            rows.append(F.unfold(shown, kernel, padding=(kernel[0] // 2, kernel[1] // 2)))
        return torch.cat(rows).flatten(0, 1)
