"""C1: one 3x3 convolution, then the classifier."""

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...lib.nn import to_batchnorm
from ..layers import DEFAULT_NORM, NormLayer, conv_bn_relu, init_weights
from ..pyramid import through_map
from .base import NORM_BIAS, Decoder


class C1(Decoder):
    """3x3 convolution to a quarter of the channels, and a 1x1 classifier.

    Args:
        in_channels: channels of every feature map the encoder returns.
        num_class: number of classes.
        deepsup: add a second such head on the last but one feature map, used in training only.
        use_softmax: see `Decoder`.
        norm_layer: makes a normalization layer from a number of channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_class: int = 150,
        *,
        deepsup: bool = False,
        use_softmax: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__(in_channels, num_class, use_softmax)
        width = in_channels[-1] // 4
        self.cbr = conv_bn_relu(in_channels[-1], width, norm_layer=norm_layer)
        if deepsup:
            self.make_deepsup(width, norm_layer)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        if deepsup:
            self.conv_last_deepsup = nn.Conv2d(width, num_class, 1)
        init_weights(self, norm_bias=NORM_BIAS)

    def __prepare_scriptable__(self) -> nn.Module:
        """Module that `torch.jit.script` compiles in place of a `C1` without deep supervision."""
        return self if hasattr(self, "cbr_deepsup") else _ScriptableC1(self)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        return self.conv_last(through_map(self.cbr, features))


class _ScriptableC1(nn.Module):
    """A `C1` that TorchScript can compile: it shares the weights, and its norms are not synchronized."""

    def __init__(self, decoder: C1):
        super().__init__()
        shared = {id(x): x for x in (*decoder.parameters(), *decoder.buffers())}
        self.cbr = to_batchnorm(copy.deepcopy(decoder.cbr, shared))
        self.conv_last, self.use_softmax = decoder.conv_last, decoder.use_softmax

    def forward(self, features: list[Tensor], segSize: tuple[int, int] | None = None) -> Tensor:
        """See `Decoder.forward`."""
        scores = self.conv_last(self.cbr(features[-1]))
        if segSize is not None:
            size = [segSize[0], segSize[1]]
            return F.interpolate(scores, size, mode="bilinear", align_corners=False).softmax(dim=1)
        return scores.softmax(dim=1) if self.use_softmax else scores.log_softmax(dim=1)
