"""Building blocks that encoders and decoders share."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib.nn import SynchronizedBatchNorm2d

NormLayer = Callable[[int], nn.Module]
# The divisor sqrt(var + eps) everywhere: on one device, on many, and in evaluation.
DEFAULT_NORM: NormLayer = partial(SynchronizedBatchNorm2d, clamp_variance=False)
POOL_SCALES = (1, 2, 3, 6)  # bins per side of the pyramid, Zhao et al., "Pyramid Scene Parsing Network", 2017


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1, norm_layer: NormLayer = DEFAULT_NORM
) -> nn.Sequential:
    """Convolution without bias ("same" padding), normalization and ReLU; state-dict keys `0`, `1`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        norm_layer(out_channels),
        nn.ReLU(inplace=True),
    )


def pooling_branches(channels: int, width: int, norm_layer: NormLayer = DEFAULT_NORM) -> nn.ModuleList:
    """The branches of pyramid pooling: averages over 1, 4, 9 and 36 regions, each through a 1x1 convolution."""
    return nn.ModuleList(
        nn.Sequential(nn.AdaptiveAvgPool2d(bins), *conv_bn_relu(channels, width, 1, norm_layer=norm_layer))
        for bins in POOL_SCALES
    )


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Bilinear resize of (N, C, H, W) to (N, C, *size).

    Args:
        align_corners: the centres of the corner pixels keep their places, as in PyTorch before 0.4; else their outer
            corners do.
    """
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def dilation_of_stage(stride: int, current_stride: int, output_stride: int) -> tuple[int, int, int]:
    """Turn strides into dilation once the wanted output stride is reached.

    Args:
        stride: stride the stage has in the undilated network.
        current_stride: stride of its input in the undilated network, relative to the picture.
        output_stride: largest stride allowed.

    Returns:
        (stride, dilation of the convolution that would have been strided, dilation of the others): in the first block
        of a dilated stage the strided convolution still sees its input at the previous stage's spacing.
    """
    before = max(1, current_stride // output_stride)
    after = max(1, current_stride * stride // output_stride)
    return stride * before // after, before, after


def init_weights(module: nn.Module, *, norm_bias: float = 0.0) -> None:
    """Kaiming-normal convolutions (He et al., 2015), zero biases, norms with weight 1 and the given bias."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
            nn.init.ones_(part.weight)
            nn.init.constant_(part.bias, norm_bias)
