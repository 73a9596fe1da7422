"""The pyramid pooling head of PSPNet (Zhao et al., 2017) as the Cityscapes toolbox has it."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import DEFAULT_NORM, POOL_SCALES, NormLayer, init_weights, norm_act, pooling_branches
from ..pyramid import through_pyramid
from .base import Decoder

WIDTH = 512


class PSP(Decoder):
    """`PPM` with the pooled maps before the features, leaky ReLU 0.01 and aligned corners.

    Args:
        in_channels: channels of every feature map the encoder returns.
        num_class: number of classes.
        deepsup: add a head on the last but one feature map, used in training only.
        use_softmax: see `Decoder`.
        norm_layer: makes a normalization layer from a number of channels.
    """

    align_corners = True

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
        self.stages = pooling_branches(channels, WIDTH, norm_layer, activation="leaky_relu")
        self.bottleneck = nn.Sequential(
            nn.Conv2d(channels + len(POOL_SCALES) * WIDTH, WIDTH, 3, padding=1, bias=False),
            *norm_act(norm_layer, WIDTH, "leaky_relu"),
            nn.Dropout2d(0.1),
        )
        if deepsup:
            self.make_deepsup(WIDTH, norm_layer, dropout=0.1, bias=True, activation="leaky_relu")
        self.conv_last = nn.Conv2d(WIDTH, num_class, 1)
        if deepsup:
            self.conv_last_deepsup = nn.Conv2d(WIDTH, num_class, 1)
        init_weights(self)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        x = features[-1]
        pooled = [stage(x) for stage in self.stages]
        options = {"align_corners": self.align_corners, "smaller_first": True}
        return self.conv_last(through_pyramid(self.bottleneck, x, pooled, **options))
