"""Decoders that consist of convolutions only: C1, and the version 1.0 decoders C1Bilinear and C5Bilinear."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from ...lib.nn import to_batchnorm
from ..layers import NormLayer, conv_bn_relu
from .base import Decoder

WIDTH = 512  # number of output channels of the 3x3 convolutions in C5Bilinear


class C1(Decoder):
    """A 3x3 convolution that reduces the channels to a quarter, then a 1x1 classifier."""

    def make_layers(self, norm_layer: NormLayer) -> None:
        channels = self.in_channels[-1]
        self.cbr = conv_bn_relu(channels, channels // 4, norm_layer=norm_layer)
        if self.deepsup:
            self.make_deepsup(channels // 4, norm_layer)
        self.conv_last = nn.Conv2d(channels // 4, self.num_class, 1)

    def head(self, features: list[Tensor]) -> Tensor:
        return self.conv_last(self.cbr(features[-1]))

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the module that `torch.jit.script` compiles in place of this one."""
        return self if self.deepsup else _ScriptableC1(self)


class _ScriptableC1(nn.Module):
    """`C1` for TorchScript: shares the weights of a `C1`, with `nn.BatchNorm2d` as norm."""

    def __init__(self, decoder: C1):
        super().__init__()
        shared = {id(x): x for x in (*decoder.parameters(), *decoder.buffers())}
        self.cbr = to_batchnorm(copy.deepcopy(decoder.cbr, shared))
        self.conv_last, self.use_softmax = decoder.conv_last, decoder.use_softmax

    def forward(self, features: list[Tensor], segSize: tuple[int, int] | None = None) -> Tensor:
        logits = self.conv_last(self.cbr(features[-1]))
        if segSize is not None:
            return F.interpolate(logits, [segSize[0], segSize[1]], mode="bilinear", align_corners=False).softmax(dim=1)
        return logits.softmax(dim=1) if self.use_softmax else logits.log_softmax(dim=1)


class C1Bilinear(Decoder):
    """A single 1x1 convolution without bias; resizes with `align_corners=True`."""

    align_corners = True

    def make_layers(self, norm_layer: NormLayer) -> None:
        self.conv_last = nn.Conv2d(self.in_channels[-1], self.num_class, 1, bias=False)

    def head(self, features: list[Tensor]) -> Tensor:
        return self.conv_last(features[-1])


class C5Bilinear(Decoder):
    """Four 3x3 convolutions (two dilated) and a 1x1 classifier without bias; resizes with `align_corners=True`."""

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
