"""MobileNetV2 (Sandler et al., 2018) and EfficientNet-Lite0 (Liu, 2020) without their last 1x1 convolution."""

from bisect import bisect_left
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..layers import (
    DEFAULT_NORM,
    NormLayer,
    check_output_stride,
    conv_bn,
    conv_bn_relu,
    dilation_of_stage,
    init_layer,
    renormalize,
)

torch.fx.wrap("renormalize")  # creates tensors for a dtype and a device, which are unknown in FX tracing


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution and linear 1x1 projection, with an optional shortcut.

    `depthwise` are options of the depthwise convolution, see `conv2d`.
    """

    is_block = True  # activation checkpointing and compilation apply to blocks

    def __init__(self, in_channels, out_channels, expansion, kernel_size, *, norm_layer, shortcut: bool, **depthwise):
        super().__init__()
        hidden = in_channels * expansion
        conv_bn_relu6 = partial(conv_bn_relu, norm_layer=norm_layer, activation="relu6")
        expand = [] if expansion == 1 else conv_bn_relu6(in_channels, hidden, 1)
        depthwise = conv_bn_relu6(hidden, hidden, kernel_size, groups=hidden, **depthwise)
        project = conv_bn(hidden, out_channels, 1, norm_layer=norm_layer)
        self.conv = nn.Sequential(*expand, *depthwise, *project)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 with five feature maps: the outputs of the four blocks in `taps` and of the last block."""

    out_channels = (24, 32, 64, 160, 320)
    # (expansion, channels, blocks, stride, kernel size) of each stage, from table 2 of the paper
    stages = (
        *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3)),
        *((6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3)),
    )
    taps = (2, 4, 7, 14)  # indices in `features` of the first block of each strided stage
    same_padding = False  # see `conv2d`

    def __init__(self, *, output_stride: int = 32, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        self.output_stride = check_output_stride(output_stride)
        padding = {"same_padding": self.same_padding}
        blocks = [conv_bn_relu(3, 32, stride=2, norm_layer=norm_layer, activation="relu6", **padding)]
        channels, input_stride = 32, 2
        for expansion, planes, depth, stage_stride, kernel_size in self.stages:
            stride, first_dilation, dilation = dilation_of_stage(stage_stride, input_stride, output_stride)
            for i in range(depth):
                # The first block of a stage has no shortcut, because it changes the number of channels.
                options = {"stride": 1, "dilation": dilation} if i else {"stride": stride, "dilation": first_dilation}
                options |= {"norm_layer": norm_layer, "shortcut": i > 0, **padding}
                blocks.append(InvertedResidual(channels, planes, expansion, kernel_size, **options))
                channels = planes
            input_stride *= stage_stride
        self.features = nn.Sequential(*blocks)
        self.apply(init_layer)

    def stage_of(self, name: str) -> int:
        """Return the stage (0: stem) of the parameter with this name; see `build_optimizer`."""
        ends = list(accumulate((depth for _, _, depth, *_ in self.stages), initial=0))
        return bisect_left(ends, int(name.split(".")[1]))

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        maps = []
        for i, block in enumerate(self.features):
            x = block(x)
            if i in self.taps:
                maps.append(x)
        return [*maps, x] if return_feature_maps else [x]


class EfficientNetLite0(MobileNetV2):
    """EfficientNet-Lite0 with four feature maps: the outputs of the last block of each resolution.

    Like all encoders, it takes images with ImageNet normalization, and converts them to (value - 127) / 128. Source:
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    out_channels = (24, 40, 112, 320)
    stages = (
        *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
        *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
    )
    taps = (3, 5, 11)
    same_padding = True
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3  # for R, G and B values in 0..1

    def __init__(self, **options):
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 1e-3

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        return super().forward(renormalize(x, self.mean, self.std), return_feature_maps)
