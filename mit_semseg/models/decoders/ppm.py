"""Decoders of PSPNet (`PPM`, `PSPBilinear`, `PSP`) and DeepLabV3 (`ASPP`).

Zhao et al., "Pyramid Scene Parsing Network", 2017; Chen et al., "Rethinking Atrous Convolution for Semantic Image
Segmentation", 2017. `PSP` and `ASPP` are from the Cityscapes toolbox, speedinghzl/pytorch-segmentation-toolbox.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..layers import POOL_SCALES, NormLayer, conv_bn_relu, pooling_branch, pooling_branches
from ..pyramid import pyramid_sequential
from .base import Decoder

WIDTH = 512  # number of channels of each pooling branch and of the fused map
ASPP_WIDTH = 256  # number of channels of each ASPP branch
ASPP_RATES = (12, 24, 36)  # dilations of three ASPP branches at output stride 8


def _fusion(channels: int, norm_layer: NormLayer, activation: str = "relu") -> nn.Sequential:
    block = conv_bn_relu(channels + len(POOL_SCALES) * WIDTH, WIDTH, norm_layer=norm_layer, activation=activation)
    return nn.Sequential(*block, nn.Dropout2d(0.1))


class PPM(Decoder):
    """Concatenates the last feature map with its averages over 1, 4, 9 and 36 bins; fuses them by a 3x3 convolution."""

    pooling_name = "ppm"  # name of the pooling branches in the state dict

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        self.add_module(self.pooling_name, pooling_branches(channels, WIDTH, norm_layer))
        if self.deepsup:
            self.make_deepsup(channels // 4, norm_layer, dropout=0.1)
        self.conv_last = nn.Sequential(*_fusion(channels, norm_layer), nn.Conv2d(WIDTH, self.num_class, 1))

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        pooled = [branch(x) for branch in getattr(self, self.pooling_name)]
        return pyramid_sequential(self.conv_last, x, pooled, align_corners=self.align_corners)


class PSPBilinear(PPM):
    """`PPM` of version 1.0; resizes with `align_corners=True`."""

    align_corners = True
    pooling_name = "psp"


class PSP(Decoder):
    """`PPM` variant with leaky ReLU and `align_corners=True`; the pooled maps come first in the concatenation."""

    align_corners = True
    norm_bias = 0.0

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        self.stages = pooling_branches(channels, WIDTH, norm_layer, "leaky_relu")
        self.bottleneck = _fusion(channels, norm_layer, "leaky_relu")
        if self.deepsup:
            self.make_deepsup(WIDTH, norm_layer, dropout=0.1, bias=True, activation="leaky_relu")
        self.conv_last = nn.Conv2d(WIDTH, self.num_class, 1)

    def head(self, features: list[Tensor]) -> Tensor:
        pooled = [stage(features[-1]) for stage in self.stages]
        options = {"align_corners": True, "smaller_first": True}
        return self.conv_last(pyramid_sequential(self.bottleneck, features[-1], pooled, **options))


class ASPP(Decoder):
    """Concatenates image pooling, a 1x1 and three dilated 3x3 convolutions; fuses them by a 1x1 convolution."""

    align_corners = True
    norm_bias = 0.0

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        block = partial(conv_bn_relu, norm_layer=norm_layer, activation="leaky_relu")
        self.conv1 = pooling_branch(1, channels, ASPP_WIDTH, norm_layer, "leaky_relu")
        self.conv2 = block(channels, ASPP_WIDTH, 1)
        for i, rate in enumerate(ASPP_RATES, start=3):
            dilation = max(1, rate * 8 // self.output_stride)
            self.add_module(f"conv{i}", block(channels, ASPP_WIDTH, dilation=dilation))
        self.bottleneck = nn.Sequential(*block(5 * ASPP_WIDTH, WIDTH, 1), nn.Dropout2d(0.1))
        if self.deepsup:
            self.make_deepsup(WIDTH, norm_layer, dropout=0.1, bias=True, activation="leaky_relu")
        self.conv_last = nn.Conv2d(WIDTH, self.num_class, 1)

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        branches = torch.cat([self.conv2(x), self.conv3(x), self.conv4(x), self.conv5(x)], dim=1)
        options = {"align_corners": True, "smaller_first": True}
        return self.conv_last(pyramid_sequential(self.bottleneck, branches, [self.conv1(x)], **options))
