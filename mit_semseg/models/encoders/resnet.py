"""ResNet (He et al., 2015) and ResNeXt (Xie et al., 2016) with a stem of three 3x3 convolutions."""

import re
from functools import partial

from torch import Tensor, nn

from ..layers import (
    DEFAULT_NORM,
    NormLayer,
    check_output_stride,
    conv2d,
    conv_bn,
    conv_bn_relu,
    dilation_of_stage,
    init_layer,
    norm_act,
    norm_add_relu,
)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the stride applies to the first convolution."""

    expansion = 1
    is_block = True  # activation checkpointing and compilation apply to blocks

    def __init__(self, in_channels, planes, *, stride, first_dilation, dilation, downsample, norm_layer):
        super().__init__()
        self.conv1 = conv2d(in_channels, planes, 3, stride=stride, dilation=first_dilation)
        self.bn1, self.relu = norm_act(norm_layer, planes)
        self.conv2 = conv2d(planes, planes, 3, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return norm_add_relu(self.bn2, self.conv2(y), shortcut)


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 (with stride and dilation) and a 1x1 convolution to 4 * `planes` channels."""

    expansion = 4
    groups = 1
    is_block = True  # activation checkpointing and compilation apply to blocks

    def __init__(self, in_channels, planes, *, stride, first_dilation, dilation, downsample, norm_layer):
        super().__init__()
        width = planes if self.groups == 1 else self.groups * planes // 16
        self.conv1 = conv2d(in_channels, width, 1)
        self.bn1, self.relu = norm_act(norm_layer, width)
        self.conv2 = conv2d(width, width, 3, stride=stride, dilation=first_dilation, groups=self.groups)
        self.bn2, _ = norm_act(norm_layer, width)
        self.conv3 = conv2d(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return norm_add_relu(self.bn3, self.conv3(y), shortcut)


class ResNeXtBottleneck(Bottleneck):
    """`Bottleneck` of ResNeXt 32x4d: 32 groups in the 3x3 convolution, which has 2 * `planes` channels."""

    groups = 32


def make_layer(block, in_channels, planes, depth, *, stride=1, first_dilation=1, dilation=1, norm_layer):
    """Return a stage of `depth` blocks; `stride` and `first_dilation` apply to the first block only."""
    out_channels, downsample = planes * block.expansion, None
    if stride != 1 or in_channels != out_channels:
        downsample = conv_bn(in_channels, out_channels, 1, stride=stride, norm_layer=norm_layer)
    shared = {"dilation": dilation, "norm_layer": norm_layer}
    first = block(in_channels, planes, stride=stride, first_dilation=first_dilation, downsample=downsample, **shared)
    shared |= {"stride": 1, "first_dilation": dilation, "downsample": None}
    return nn.Sequential(first, *(block(out_channels, planes, **shared) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """ResNet with four feature maps at strides 4, 8, 16 and 32; dilation limits these strides to `output_stride`.

    Args:
        depths: number of blocks in each of the four stages.
        stem: number of channels after the three stem convolutions; 128, or 64 for version 1.0.
        full_dilation: use the dilation of a stage also in its first 3x3 convolution (by default, half this dilation),
            and use `ceil_mode` in max pooling. This is the ResNet of the Cityscapes toolbox (see `decoders.ppm`).
    """

    def __init__(
        self, block, depths, *, output_stride=32, stem=128, full_dilation=False, norm_layer: NormLayer = DEFAULT_NORM
    ):
        super().__init__()
        self.output_stride = check_output_stride(output_stride)
        self.conv1, self.bn1, self.relu1 = conv_bn_relu(3, 64, stride=2, norm_layer=norm_layer)
        self.conv2, self.bn2, self.relu2 = conv_bn_relu(64, 64, norm_layer=norm_layer)
        self.conv3, self.bn3, self.relu3 = conv_bn_relu(64, stem, norm_layer=norm_layer)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=full_dilation)
        channels, input_stride = stem, 4
        for i, depth in enumerate(depths):
            planes, stage_stride = 64 * 2**i, 1 if i == 0 else 2
            stride, first_dilation, dilation = dilation_of_stage(stage_stride, input_stride, output_stride)
            dilations = {"first_dilation": dilation if full_dilation else first_dilation, "dilation": dilation}
            stage = make_layer(block, channels, planes, depth, stride=stride, **dilations, norm_layer=norm_layer)
            setattr(self, f"layer{i + 1}", stage)
            channels, input_stride = planes * block.expansion, input_stride * stage_stride
        self.out_channels = tuple(64 * 2**i * block.expansion for i in range(4))
        self.apply(init_layer)

    def stage_of(self, name: str) -> int:
        """Return the stage (0: stem) of the parameter with this name; see `build_optimizer`."""
        match = re.match(r"layer(\d)", name)
        return int(match[1]) if match else 0

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.maxpool(x)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps if return_feature_maps else [x]


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))
resnext101 = partial(ResNet, ResNeXtBottleneck, (3, 4, 23, 3))
