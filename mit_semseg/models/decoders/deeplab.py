"""DeepLabV3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import DEFAULT_NORM, AveragePooling, NormLayer, init_weights, norm_act
from ..pyramid import through_pyramid
from .base import Decoder

WIDTH = 256  # of a branch
FUSED = 512
# Dilation times output stride of the three dilated branches, in pixels of the picture: 12, 24 and 36 at stride 8.
REACHES = (96, 192, 288)


class ASPP(Decoder):
    """Atrous spatial pyramid pooling: the picture's average, a 1x1 and three dilated 3x3 convolutions, fused.

    As the Cityscapes toolbox has it: leaky ReLU 0.01, aligned corners.

    Args:
        in_channels: channels of every feature map the encoder returns.
        num_class: number of classes.
        output_stride: of the last feature map; the dilation follows it.
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
        output_stride: int = 8,
        deepsup: bool = False,
        use_softmax: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__(in_channels, num_class, use_softmax)
        channels = in_channels[-1]
        self.conv1 = nn.Sequential(AveragePooling(1), *_branch(channels, 1, 1, norm_layer))
        self.conv2 = _branch(channels, 1, 1, norm_layer)
        for number, reach in enumerate(REACHES, start=3):
            self.add_module(f"conv{number}", _branch(channels, 3, max(1, reach // output_stride), norm_layer))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(5 * WIDTH, FUSED, 1, bias=False), *norm_act(norm_layer, FUSED, "leaky_relu"), nn.Dropout2d(0.1)
        )
        if deepsup:
            self.make_deepsup(FUSED, norm_layer, dropout=0.1, bias=True, activation="leaky_relu")
        self.conv_last = nn.Conv2d(FUSED, num_class, 1)
        if deepsup:
            self.conv_last_deepsup = nn.Conv2d(FUSED, num_class, 1)
        init_weights(self)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        x = features[-1]
        branches = torch.cat([self.conv2(x), self.conv3(x), self.conv4(x), self.conv5(x)], dim=1)
        options = {"align_corners": self.align_corners, "smaller_first": True}
        return self.conv_last(through_pyramid(self.bottleneck, branches, [self.conv1(x)], **options))


def _branch(channels: int, kernel_size: int, dilation: int, norm_layer: NormLayer) -> nn.Sequential:
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(channels, WIDTH, kernel_size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, *norm_act(norm_layer, WIDTH, "leaky_relu"))
