"""A convolution over a feature map and smaller maps that are resized to it, without the resized maps.

The maps of pyramid pooling have 1 + 4 + 9 + 36 positions in all, each map of a feature pyramid a quarter of those of
the next. Resizing them and the convolution over the result are both linear, so they can change places: first the taps
of the convolution at the map's own few positions, then, for rows and columns one after the other, a small matrix that
says how much of every position and tap arrives at every output row or column. The matrices depend on the sizes alone.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import is_symbolic, on_device, resize

GAIN = 2.0  # times fewer multiplications that a map needs to go this way: they are in smaller matrices
CACHED_MATRICES = 64  # up to some 100 KB each; a few sizes of pictures come again and again


def through_pyramid(layers: nn.Sequential, x: Tensor, smaller: Sequence[Tensor], **options) -> Tensor:
    """`layers(cat([x, *resized smaller maps]))`, where the first layer is a convolution: see `conv_over_pyramid`."""
    conv, *rest = layers
    x = conv_over_pyramid(conv, x, smaller, **options)
    for layer in rest:
        x = layer(x)
    return x


def conv_over_pyramid(
    conv: nn.Conv2d, x: Tensor, smaller: Sequence[Tensor], *, align_corners: bool = False, smaller_first: bool = False
) -> Tensor:
    """`conv(cat([x, *resized smaller maps]))`, up to rounding.

    Args:
        conv: over all channels, stride 1, not dilated, "same" padding with zeros.
        x: (N, C, h, w).
        smaller: (N, c, a, b) each, any a and b; one that is not much smaller than `x` is resized.
        align_corners: of the bilinear resize.
        smaller_first: the concatenation begins with the smaller maps.

    Returns:
        (N, conv.out_channels, h, w).
    """
    if is_symbolic(*x.shape[-2:]):
        return conv_over_resized(conv, x, smaller, align_corners=align_corners, smaller_first=smaller_first)
    channels, size = [t.size(1) for t in smaller], x.shape[-2:]
    parts = conv.weight.split([*channels, x.size(1)] if smaller_first else [x.size(1), *channels], dim=1)
    own, others = (parts[-1], parts[:-1]) if smaller_first else (parts[0], parts[1:])
    direct, weights, rows, columns = [x], [own], [], []
    for t, weight in zip(smaller, others, strict=True):
        if _gain(t, size, conv.kernel_size) < GAIN:
            direct.append(resize(t, size, align_corners=align_corners))
            weights.append(weight)
        else:
            rows.append(_spread_over_rows(t, weight, size[0], align_corners))
            matrix = _arrivals(t.size(-1), size[1], weight.size(3), align_corners, x.device)
            columns.append(matrix.to(rows[-1].dtype))
    if len(direct) == 1:
        y = F.conv2d(x, own, conv.bias, padding=conv.padding)
    else:
        y = F.conv2d(torch.cat(direct, dim=1), torch.cat(weights, dim=1), conv.bias, padding=conv.padding)
    return y + _spread_over_columns(torch.cat(rows, dim=2), torch.cat(columns, dim=1)) if rows else y


class Concatenated(Sequence):
    """A list with one feature map, made when it is asked for: several maps resized to one size and concatenated.

    Args:
        maps: (N, C, h, w) each.
        which: number of the map whose size they get.
    """

    def __init__(self, maps: Sequence[Tensor], which: int = 0):
        self.maps, self.which, self._whole = maps, which, None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index):
        if self._whole is None:
            size = self.maps[self.which].shape[-2:]
            self._whole = torch.cat([resize(x, size) for x in self.maps], dim=1)
        return [self._whole][index]


def through_map(layers: nn.Sequential, features: Sequence[Tensor], which: int = -1) -> Tensor:
    """`layers(features[which])`, where the first layer is a convolution, without concatenating anything for it."""
    if isinstance(features, Concatenated) and features.which == 0:
        return through_pyramid(layers, features.maps[0], features.maps[1:])
    return layers(features[which])


def conv_over_resized(
    conv: nn.Conv2d, x: Tensor, smaller: Sequence[Tensor], *, align_corners: bool = False, smaller_first: bool = False
) -> Tensor:
    """The definition of `conv_over_pyramid`: resize, concatenate, convolve."""
    resized = [resize(t, x.shape[-2:], align_corners=align_corners) for t in smaller]
    return conv(torch.cat([*resized, x] if smaller_first else [x, *resized], dim=1))


def _gain(t: Tensor, size: tuple[int, int], kernel: tuple[int, int]) -> float:
    """How many times fewer multiplications a map needs, per output channel, when it is not resized."""
    (c, a, b), (height, width), (k, m) = t.shape[1:], size, kernel
    return k * m * c * height * width / (k * m * c * a * b + height * k * a * m * b + height * width * m * b)


def _spread_over_rows(t: Tensor, weight: Tensor, height: int, align_corners: bool) -> Tensor:
    """What arrives at every output row from a map (N, c, a, b) through the taps of a convolution (O, c, k, m).

    Returns:
        (N, height, m * b, O): from every horizontal tap and column of the map.
    """
    n, _, a, b = t.shape
    outputs, _, k, m = weight.shape
    taps = torch.einsum("ncab,ocij->niajbo", t, weight).reshape(n, k * a, m * b * outputs)
    matrix = _arrivals(a, height, k, align_corners, t.device)
    return (matrix.to(taps.dtype) @ taps).view(n, height, m * b, outputs)


def _spread_over_columns(rows: Tensor, matrix: Tensor) -> Tensor:
    """(N, H, K, O) and (W, K) -> (N, O, H, W), in channels-last memory format."""
    # One product per row in either memory format: `rows.permute(0, 3, 1, 2) @ matrix.T` would be one per channel and
    # image, each ending in a barrier of all threads, which costs many times the arithmetic when a core is busy.
    return (matrix @ rows).permute(0, 3, 1, 2)


@lru_cache(maxsize=CACHED_MATRICES)
def _arrivals(source: int, target: int, taps: int, align_corners: bool, device: torch.device) -> Tensor:
    """How much of every tap and position arrives at every output position: (target, taps * source) float64."""
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be used in training
        unit = torch.eye(source, dtype=torch.float64).view(1, source, source, 1)
        shown = resize(unit, (target, 1), align_corners=align_corners)[0, :, :, 0]  # (source, target)
        padded = F.pad(shown, (taps // 2, taps // 2))
        matrix = torch.stack([padded[:, tap : tap + target] for tap in range(taps)])  # (taps, source, target)
        return on_device(matrix.flatten(0, 1).T.contiguous(), device)
