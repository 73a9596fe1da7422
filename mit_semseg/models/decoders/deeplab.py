"""DeepLabV3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017)."""

import torch
from torch import Tensor, nn

from ..layers import AveragePooling, NormLayer, conv_bn_relu
from ..pyramid import pyramid_sequential
from .base import Decoder

BRANCH_WIDTH = 256
FUSED_WIDTH = 512
RATES = (12, 24, 36)  # dilation of the three dilated branches at output stride 8


class ASPP(Decoder):
    """Atrous spatial pyramid pooling: image pooling, a 1x1 and three dilated 3x3 convolutions, concatenated and fused.

    As in the Cityscapes toolbox: leaky ReLU 0.01, aligned corners.
    """

    align_corners = True
    norm_bias = 0.0

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        self.conv1 = nn.Sequential(AveragePooling(1), *_branch(channels, 1, 1, norm_layer))
        self.conv2 = _branch(channels, 1, 1, norm_layer)
        for i, rate in enumerate(RATES, start=3):
            dilation = max(1, rate * 8 // self.output_stride)
            self.add_module(f"conv{i}", _branch(channels, 3, dilation, norm_layer))
        self.bottleneck = nn.Sequential(
            *conv_bn_relu(5 * BRANCH_WIDTH, FUSED_WIDTH, 1, norm_layer=norm_layer, activation="leaky_relu"),
            nn.Dropout2d(0.1),
        )
        if self.deepsup:
            self.make_deepsup(FUSED_WIDTH, norm_layer, dropout=0.1, bias=True, activation="leaky_relu")
        self.conv_last = nn.Conv2d(FUSED_WIDTH, self.num_class, 1)

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        branches = torch.cat([self.conv2(x), self.conv3(x), self.conv4(x), self.conv5(x)], dim=1)
        fused = pyramid_sequential(
            self.bottleneck, branches, [self.conv1(x)], align_corners=self.align_corners, smaller_first=True
        )
        return self.conv_last(fused)


def _branch(channels: int, kernel_size: int, dilation: int, norm_layer: NormLayer) -> nn.Sequential:
    options = {"norm_layer": norm_layer, "activation": "leaky_relu"}
    return conv_bn_relu(channels, BRANCH_WIDTH, kernel_size, dilation=dilation, **options)
