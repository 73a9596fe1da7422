"""MobileNetV2 (Sandler et al., 2018) without its last 1x1 convolution."""

from functools import partial

from torch import Tensor, nn

from ..layers import DEFAULT_NORM, NormLayer, check_output_stride, conv_bn, conv_bn_relu, dilation_of_stage, init_layer

# (expansion, channels, blocks, stride) of each stage, from table 2 of the paper
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
TAPS = (2, 4, 7, 14)  # indices in `features` of the first block of each strided stage; the outputs are feature maps


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution and linear 1x1 projection, with an optional shortcut."""

    is_block = True  # activation checkpointing and compilation apply to blocks

    def __init__(self, in_channels, out_channels, expansion, *, stride, dilation, norm_layer, shortcut: bool):
        super().__init__()
        hidden = in_channels * expansion
        conv_bn_relu6 = partial(conv_bn_relu, norm_layer=norm_layer, activation="relu6")
        expand = [] if expansion == 1 else conv_bn_relu6(in_channels, hidden, 1)
        depthwise = conv_bn_relu6(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        project = conv_bn(hidden, out_channels, 1, norm_layer=norm_layer)
        self.conv = nn.Sequential(*expand, *depthwise, *project)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 with five feature maps: the outputs of the four blocks in `TAPS` and of the last block."""

    out_channels = (24, 32, 64, 160, 320)

    def __init__(self, *, output_stride: int = 32, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        self.output_stride = check_output_stride(output_stride)
        blocks = [conv_bn_relu(3, 32, stride=2, norm_layer=norm_layer, activation="relu6")]
        channels, input_stride = 32, 2
        for expansion, planes, depth, stage_stride in STAGES:
            stride, first_dilation, dilation = dilation_of_stage(stage_stride, input_stride, output_stride)
            for i in range(depth):
                # The first block of a stage has no shortcut, because it changes the number of channels.
                options = {"stride": 1, "dilation": dilation} if i else {"stride": stride, "dilation": first_dilation}
                block = InvertedResidual(channels, planes, expansion, norm_layer=norm_layer, shortcut=i > 0, **options)
                blocks.append(block)
                channels = planes
            input_stride *= stage_stride
        self.features = nn.Sequential(*blocks)
        self.apply(init_layer)

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        maps = []
        for i, block in enumerate(self.features):
            x = block(x)
            if i in TAPS:
                maps.append(x)
        return [*maps, x] if return_feature_maps else [x]
