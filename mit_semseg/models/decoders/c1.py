"""C1: one 3x3 convolution and a classifier."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from ...lib.nn import to_batchnorm
from ..layers import NormLayer, conv_bn_relu
from .base import Decoder


class C1(Decoder):
    """3x3 convolution to a quarter of the channels, then a 1x1 classifier."""

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
    """`C1` for TorchScript: shares the weights; its norms are not synchronized."""

    def __init__(self, decoder: C1):
        super().__init__()
        shared = {id(x): x for x in (*decoder.parameters(), *decoder.buffers())}
        self.cbr = to_batchnorm(copy.deepcopy(decoder.cbr, shared))
        self.conv_last, self.use_softmax = decoder.conv_last, decoder.use_softmax

    def forward(self, features: list[Tensor], segSize: tuple[int, int] | None = None) -> Tensor:
        scores = self.conv_last(self.cbr(features[-1]))
        if segSize is not None:
            size = [segSize[0], segSize[1]]
            return F.interpolate(scores, size, mode="bilinear", align_corners=False).softmax(dim=1)
        return scores.softmax(dim=1) if self.use_softmax else scores.log_softmax(dim=1)
