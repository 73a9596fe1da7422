"""MobileNetV2 (Sandler et al., 2018) without its last 1x1 convolution."""

from torch import Tensor, nn

from ...lib.nn import Blocks
from ..layers import DEFAULT_NORM, NormLayer, dilation_of_stage, init_weights, norm_act, plain_norm

# expansion, channels, blocks, stride: table 2 of the paper
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
TAPS = (2, 4, 7, 14)  # blocks whose output is returned as a feature map: the first block of every strided stage


def _conv_bn_relu6(in_channels, out_channels, kernel_size, norm_layer, *, stride=1, dilation=1, groups=1):
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
    return [conv, *norm_act(norm_layer, out_channels, "relu6")]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; a shortcut where the shapes allow it."""

    def __init__(self, in_channels, out_channels, expansion, *, stride, dilation, norm_layer, shortcut: bool):
        super().__init__()
        hidden = in_channels * expansion
        layers = [] if expansion == 1 else _conv_bn_relu6(in_channels, hidden, 1, norm_layer)
        layers += _conv_bn_relu6(hidden, hidden, 3, norm_layer, stride=stride, dilation=dilation, groups=hidden)
        layers += [nn.Conv2d(hidden, out_channels, 1, bias=False), plain_norm(norm_layer, out_channels)]
        self.conv = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H / stride, W / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Five feature maps: after the first block of each strided stage, and the last.

    Args:
        output_stride: 8, 16 or 32.
        norm_layer: makes a normalization layer from a number of channels.
    """

    out_channels = (24, 32, 64, 160, 320)

    def __init__(self, *, output_stride: int = 32, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        self.output_stride = output_stride
        blocks = [nn.Sequential(*_conv_bn_relu6(3, 32, 3, norm_layer, stride=2))]
        channels, reached = 32, 2
        for expansion, planes, depth, nominal in STAGES:
            stride, first_dilation, dilation = dilation_of_stage(nominal, reached, output_stride)
            for i in range(depth):
                # A stage that keeps its resolution has a shortcut in no first block: its channels change.
                blocks.append(
                    InvertedResidual(
                        channels,
                        planes,
                        expansion,
                        stride=stride if i == 0 else 1,
                        norm_layer=norm_layer,
                        dilation=first_dilation if i == 0 else dilation,
                        shortcut=i > 0,
                    )
                )
                channels = planes
            reached *= nominal
        self.features = Blocks(*blocks)
        init_weights(self, mode="fan_out")

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        """Feature maps of pictures (N, 3, H, W): all five, or a list with the last only."""
        maps = []
        for i, block in enumerate(self.features):
            x = self.features.through(block, x)
            if i in TAPS:
                maps.append(x)
        return [*maps, x] if return_feature_maps else [x]


mobilenetv2 = MobileNetV2
