"""Pyramid pooling of PSPNet (Zhao et al., "Pyramid Scene Parsing Network", 2017), in three published variants."""

from torch import Tensor, nn

from ..layers import POOL_SCALES, NormLayer, conv_bn_relu, pooling_branches
from ..pyramid import pyramid_sequential
from .base import Decoder

WIDTH = 512


def _fusion_and_classifier(channels: int, num_class: int, norm_layer: NormLayer) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(channels + len(POOL_SCALES) * WIDTH, WIDTH, norm_layer=norm_layer),
        nn.Dropout2d(0.1),
        nn.Conv2d(WIDTH, num_class, 1),
    )


class PPM(Decoder):
    """The last feature map and its averages over 1, 4, 9 and 36 bins, concatenated and fused by a 3x3 convolution.

    The pooled maps are resized after their convolution, norm and ReLU (in UPerNet: before).
    """

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        self.ppm = pooling_branches(channels, WIDTH, norm_layer)
        if self.deepsup:
            self.make_deepsup(channels // 4, norm_layer, dropout=0.1)
        self.conv_last = _fusion_and_classifier(channels, self.num_class, norm_layer)

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        return pyramid_sequential(self.conv_last, x, [branch(x) for branch in self.ppm])


class PSPBilinear(Decoder):
    """`PPM` of version 1.0: aligned corners, no deep supervision."""

    align_corners = True

    def make_layers(self, norm_layer: NormLayer) -> None:
        self.psp = pooling_branches(self.in_channels[-1], WIDTH, norm_layer)
        self.conv_last = _fusion_and_classifier(self.in_channels[-1], self.num_class, norm_layer)

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        pooled = [branch(x) for branch in self.psp]
        return pyramid_sequential(self.conv_last, x, pooled, align_corners=self.align_corners)


class PSP(Decoder):
    """`PPM` of the Cityscapes toolbox: pooled maps first in the concatenation, leaky ReLU 0.01, aligned corners."""

    align_corners = True
    norm_bias = 0.0

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        self.stages = pooling_branches(channels, WIDTH, norm_layer, "leaky_relu")
        self.bottleneck = nn.Sequential(
            *conv_bn_relu(channels + len(POOL_SCALES) * WIDTH, WIDTH, norm_layer=norm_layer, activation="leaky_relu"),
            nn.Dropout2d(0.1),
        )
        if self.deepsup:
            self.make_deepsup(WIDTH, norm_layer, dropout=0.1, bias=True, activation="leaky_relu")
        self.conv_last = nn.Conv2d(WIDTH, self.num_class, 1)

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        pooled = [stage(x) for stage in self.stages]
        fused = pyramid_sequential(self.bottleneck, x, pooled, align_corners=self.align_corners, smaller_first=True)
        return self.conv_last(fused)
