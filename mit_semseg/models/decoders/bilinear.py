"""Convolutional decoders of version 1.0, trained with aligned corners; its PSP decoder is in `ppm.py`."""

from torch import Tensor, nn

from ..layers import NormLayer, conv_bn_relu
from .base import Decoder

WIDTH = 512


class C1Bilinear(Decoder):
    """A single 1x1 convolution without bias."""

    align_corners = True

    def make_layers(self, norm_layer: NormLayer) -> None:
        self.conv_last = nn.Conv2d(self.in_channels[-1], self.num_class, 1, bias=False)

    def head(self, features: list[Tensor]) -> Tensor:
        return self.conv_last(features[-1])


class C5Bilinear(Decoder):
    """Four 3x3 convolutions, the first two with dilation 2, then a 1x1 classifier without bias."""

    align_corners = True

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        for i, dilation in enumerate((2, 2, 1, 1), start=1):
            conv, norm, self.relu = conv_bn_relu(channels, WIDTH, dilation=dilation, norm_layer=norm_layer)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
            channels = WIDTH
        self.conv_last = nn.Conv2d(WIDTH, self.num_class, 1, bias=False)

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for i in (1, 2, 3, 4):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            x = self.relu(norm(conv(x)))
        return self.conv_last(x)
