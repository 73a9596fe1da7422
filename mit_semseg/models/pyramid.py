"""Convolution of a feature map concatenated with resized smaller maps, computed without resizing these maps.

Bilinear resizing and convolution are linear, so their order can be changed. First, each tap of the kernel is applied to
every smaller map. Then two matrices, one for rows and one for columns, resize and shift the outputs. The pooled maps
of PPM have only 1, 4, 9 and 36 positions, so this order saves most of the multiplications.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib.utils import cache_tensors
from .layers import is_symbolic, resize

MIN_SAVING = 2.0  # a map with a smaller `_saving` is resized before the convolution


def pyramid_sequential(layers: nn.Sequential, x: Tensor, smaller: Sequence[Tensor], **options) -> Tensor:
    """Compute `layers(cat([x, *resized smaller maps]))`; the first layer must be a convolution."""
    conv, *rest = layers
    x = conv_over_pyramid(conv, x, smaller, **options)
    for layer in rest:
        x = layer(x)
    return x


def conv_over_pyramid(
    conv: nn.Conv2d, x: Tensor, smaller: Sequence[Tensor], *, align_corners: bool = False, smaller_first: bool = False
) -> Tensor:
    """Compute `conv(cat([x, *resized smaller maps]))`, up to rounding; with `smaller_first`, `x` is last.

    `x`: (N, C, h, w). Smaller maps: (N, c, a, b). `conv` has stride 1, dilation 1 and zero padding that keeps the size.
    """
    if isinstance(x, torch.fx.Proxy) or is_symbolic(*x.shape[-2:]):
        return conv_over_resized(conv, x, smaller, align_corners=align_corners, smaller_first=smaller_first)
    channels, size = [t.size(1) for t in smaller], x.shape[-2:]
    if smaller_first:
        *smaller_weights, x_weight = conv.weight.split([*channels, x.size(1)], dim=1)
    else:
        x_weight, *smaller_weights = conv.weight.split([x.size(1), *channels], dim=1)
    direct, weights, rows, columns = [x], [x_weight], [], []
    for t, weight in zip(smaller, smaller_weights, strict=True):
        if _saving(t, size, conv.kernel_size) < MIN_SAVING:
            direct.append(resize(t, size, align_corners=align_corners))
            weights.append(weight)
        else:
            rows.append(_apply_rows(t, weight, size[0], align_corners))
            columns.append(_resize_matrix(t.size(-1), size[1], weight.size(3), align_corners, rows[-1].dtype, x.device))
    if len(direct) > 1:
        x, x_weight = torch.cat(direct, dim=1), torch.cat(weights, dim=1)
    y = F.conv2d(x, x_weight, conv.bias, padding=conv.padding)
    if not rows:
        return y
    # Multiply once per row: a product per channel needs many more thread barriers, which are slow on busy cores.
    return y + (torch.cat(columns, dim=1) @ torch.cat(rows, dim=2)).permute(0, 3, 1, 2)


def conv_over_resized(
    conv: nn.Conv2d, x: Tensor, smaller: Sequence[Tensor], *, align_corners: bool = False, smaller_first: bool = False
) -> Tensor:
    """Compute the same as `conv_over_pyramid`, by resizing before the convolution."""
    resized = [resize(t, x.shape[-2:], align_corners=align_corners) for t in smaller]
    return conv(torch.cat([*resized, x] if smaller_first else [x, *resized], dim=1))


def _saving(t: Tensor, size: tuple[int, int], kernel: tuple[int, int]) -> float:
    """Return the factor by which resizing `t` after the convolution reduces the number of multiplications."""
    (c, a, b), (height, width), (k, m) = t.shape[1:], size, kernel
    return k * m * c * height * width / (k * m * c * a * b + height * k * a * m * b + height * width * m * b)


def _apply_rows(t: Tensor, weight: Tensor, height: int, align_corners: bool) -> Tensor:
    """Apply taps (O, c, k, m) to `t` (N, c, a, b), resize a to `height`, sum over k; return (N, height, m * b, O)."""
    n, _, a, b = t.shape
    outputs, _, k, m = weight.shape
    taps = torch.einsum("ncab,ocij->niajbo", t, weight).reshape(n, k * a, m * b * outputs)
    matrix = _resize_matrix(a, height, k, align_corners, taps.dtype, t.device)
    return (matrix @ taps).view(n, height, m * b, outputs)


@cache_tensors
def _resize_matrix(
    source: int, target: int, taps: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a matrix (target, taps * source): weights of taps and source positions in each target position."""
    unit = torch.eye(source, dtype=torch.float64, device=device).view(1, source, source, 1)
    resized = resize(unit, (target, 1), align_corners=align_corners)[0, :, :, 0]  # (source, target)
    padded = F.pad(resized, (taps // 2, taps // 2))
    matrix = torch.stack([padded[:, tap : tap + target] for tap in range(taps)])  # (taps, source, target)
    return matrix.flatten(0, 1).T.contiguous().to(dtype)
