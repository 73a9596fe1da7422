"""Convolution over the concatenation of a feature map and smaller maps, without resizing the smaller maps.

Bilinear resizing and convolution are linear, so their order can be changed. First, each tap of the kernel is applied to
the small map. Then two small matrices, one for rows and one for columns, resize and shift the outputs. The pooled maps
of PPM have only 1, 4, 9 and 36 positions, so this saves most of the multiplications.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import is_symbolic, resize, to_device

MIN_SAVING = 2.0  # maps for which `_saving` is smaller are resized before the convolution


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
    """Compute `conv(cat([x, *resized smaller maps]))`, up to rounding; `smaller_first` puts `x` last.

    `conv` has stride 1, no dilation and zero "same" padding; `x` is (N, C, h, w), and smaller maps are (N, c, a, b).
    """
    if is_symbolic(*x.shape[-2:]):
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
            matrix = _resize_matrix(t.size(-1), size[1], weight.size(3), align_corners, x.device)
            columns.append(matrix.to(rows[-1].dtype))
    if len(direct) > 1:
        x, x_weight = torch.cat(direct, dim=1), torch.cat(weights, dim=1)
    y = F.conv2d(x, x_weight, conv.bias, padding=conv.padding)
    if not rows:
        return y
    # One matrix product per row: one per channel would need many more thread barriers, which are slow on busy cores.
    return y + (torch.cat(columns, dim=1) @ torch.cat(rows, dim=2)).permute(0, 3, 1, 2)


def conv_over_resized(
    conv: nn.Conv2d, x: Tensor, smaller: Sequence[Tensor], *, align_corners: bool = False, smaller_first: bool = False
) -> Tensor:
    """Resize, concatenate and convolve: the reference implementation of `conv_over_pyramid`."""
    resized = [resize(t, x.shape[-2:], align_corners=align_corners) for t in smaller]
    return conv(torch.cat([*resized, x] if smaller_first else [x, *resized], dim=1))


def _saving(t: Tensor, size: tuple[int, int], kernel: tuple[int, int]) -> float:
    """Return (multiplications if `t` is resized first) / (multiplications if it is convolved first)."""
    (c, a, b), (height, width), (k, m) = t.shape[1:], size, kernel
    return k * m * c * height * width / (k * m * c * a * b + height * k * a * m * b + height * width * m * b)


def _apply_rows(t: Tensor, weight: Tensor, height: int, align_corners: bool) -> Tensor:
    """Apply taps (O, c, k, m) to (N, c, a, b), resize the rows, sum over vertical taps: (N, height, m * b, O)."""
    n, _, a, b = t.shape
    outputs, _, k, m = weight.shape
    taps = torch.einsum("ncab,ocij->niajbo", t, weight).reshape(n, k * a, m * b * outputs)
    matrix = _resize_matrix(a, height, k, align_corners, t.device)
    return (matrix.to(taps.dtype) @ taps).view(n, height, m * b, outputs)


@lru_cache(maxsize=64)  # at most about 100 KB each
def _resize_matrix(source: int, target: int, taps: int, align_corners: bool, device: torch.device) -> Tensor:
    """Return the weight of each (tap, source position) in each target position, (target, taps * source) float64."""
    with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be used in training
        unit = torch.eye(source, dtype=torch.float64).view(1, source, source, 1)
        resized = resize(unit, (target, 1), align_corners=align_corners)[0, :, :, 0]  # (source, target)
        padded = F.pad(resized, (taps // 2, taps // 2))
        matrix = torch.stack([padded[:, tap : tap + target] for tap in range(taps)])  # (taps, source, target)
        return to_device(matrix.flatten(0, 1).T.contiguous(), device)
