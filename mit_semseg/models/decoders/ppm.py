"""PPM: the pyramid pooling head of PSPNet (Zhao et al., 2017)."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import DEFAULT_NORM, POOL_SCALES, NormLayer, conv_bn_relu, init_weights, pooling_branches
from ..pyramid import through_pyramid
from .base import NORM_BIAS, Decoder

WIDTH = 512


class PPM(Decoder):
    """The last feature map beside its averages over 1, 4, 9 and 36 regions, fused by a 3x3 convolution.

    Args:
        in_channels: channels of every feature map the encoder returns.
        num_class: number of classes.
        deepsup: add a head on the last but one feature map, used in training only.
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
        channels = in_channels[-1]
        self.ppm = pooling_branches(channels, WIDTH, norm_layer)
        if deepsup:
            self.make_deepsup(channels // 4, norm_layer, dropout=0.1)
        self.conv_last = nn.Sequential(
            *conv_bn_relu(channels + len(POOL_SCALES) * WIDTH, WIDTH, norm_layer=norm_layer),
            nn.Dropout2d(0.1),
            nn.Conv2d(WIDTH, num_class, 1),
        )
        if deepsup:
            self.conv_last_deepsup = nn.Conv2d(channels // 4, num_class, 1)
        init_weights(self, norm_bias=NORM_BIAS)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        x = features[-1]
        # Pooled maps go through conv + norm + ReLU at their own few positions and are resized after (UPerNet: before).
        return through_pyramid(self.conv_last, x, [branch(x) for branch in self.ppm])
