"""ResNet (He et al., 2015) and ResNeXt (Xie et al., 2016) with a stem of three 3x3 convolutions."""

from functools import partial

from torch import Tensor, nn

from ...lib.nn import Blocks
from ..layers import (
    DEFAULT_NORM,
    NormLayer,
    conv_bn_relu,
    dilation_of_stage,
    init_weights,
    norm_act,
    norm_add_relu,
    plain_norm,
)


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride=1, dilation=1, groups=1) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first carries the stride."""

    expansion = 1

    def __init__(self, in_channels, planes, *, stride, first_dilation, dilation, groups, downsample, norm_layer):
        super().__init__()
        if groups != 1:
            raise ValueError(f"BasicBlock has no grouped convolutions, got groups={groups}")
        self.conv1 = _conv(in_channels, planes, 3, stride=stride, dilation=first_dilation)
        self.bn1, self.relu = norm_act(norm_layer, planes)
        self.conv2 = _conv(planes, planes, 3, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return norm_add_relu(self.bn2, self.conv2(y), shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries stride, dilation and groups), 1x1; four times as many channels out as `planes`."""

    expansion = 4

    def __init__(self, in_channels, planes, *, stride, first_dilation, dilation, groups, downsample, norm_layer):
        super().__init__()
        # ResNeXt-101 32x4d: 32 groups of planes / 16 channels, twice the width of the plain bottleneck.
        width = planes if groups == 1 else groups * planes * 4 // 64
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1, self.relu = norm_act(norm_layer, width)
        self.conv2 = _conv(width, width, 3, stride=stride, dilation=first_dilation, groups=groups)
        self.bn2, _ = norm_act(norm_layer, width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 * planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return norm_add_relu(self.bn3, self.conv3(y), shortcut)


def make_layer(block, in_channels, planes, depth, *, stride=1, first_dilation=1, dilation=1, groups=1, norm_layer):
    """A stage of `depth` blocks; only the first has the stride, the first dilation and a projected shortcut."""
    downsample = None
    if stride != 1 or in_channels != planes * block.expansion:
        downsample = nn.Sequential(
            _conv(in_channels, planes * block.expansion, 1, stride=stride),
            plain_norm(norm_layer, planes * block.expansion),
        )
    shared = {"dilation": dilation, "groups": groups, "norm_layer": norm_layer}
    blocks = [block(in_channels, planes, stride=stride, first_dilation=first_dilation, downsample=downsample, **shared)]
    for _ in range(depth - 1):
        blocks.append(
            block(planes * block.expansion, planes, stride=1, first_dilation=dilation, downsample=None, **shared)
        )
    return Blocks(*blocks)


class ResNet(nn.Module):
    """Feature maps at strides 4, 8, 16 and 32, the last two dilated where `output_stride` is smaller.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each of the four stages.
        groups: groups of the 3x3 convolutions (32 for ResNeXt).
        output_stride: 8, 16 or 32.
        stem: channels of the third convolution, 128, or 64 in version 1.0.
        full_dilation: the first block of a dilated stage is dilated as the others are, not half as much; and the
            pooling rounds sizes up. So has it the Cityscapes toolbox.
        norm_layer: makes a normalization layer from a number of channels.
    """

    def __init__(
        self,
        block,
        depths,
        *,
        groups: int = 1,
        output_stride: int = 32,
        stem: int = 128,
        full_dilation: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__()
        self.output_stride = output_stride
        self.conv1, self.bn1, self.relu1 = conv_bn_relu(3, 64, stride=2, norm_layer=norm_layer)
        self.conv2, self.bn2, self.relu2 = conv_bn_relu(64, 64, norm_layer=norm_layer)
        self.conv3, self.bn3, self.relu3 = conv_bn_relu(64, stem, norm_layer=norm_layer)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=full_dilation)
        channels, reached = stem, 4
        for i, depth in enumerate(depths):
            planes, nominal = 64 * 2**i, 1 if i == 0 else 2
            stride, first_dilation, dilation = dilation_of_stage(nominal, reached, output_stride)
            stage = make_layer(
                block,
                channels,
                planes,
                depth,
                stride=stride,
                first_dilation=dilation if full_dilation else first_dilation,
                dilation=dilation,
                groups=groups,
                norm_layer=norm_layer,
            )
            setattr(self, f"layer{i + 1}", stage)
            channels, reached = planes * block.expansion, reached * nominal
        self.out_channels = tuple(64 * 2**i * block.expansion for i in range(4))
        init_weights(self, mode="fan_out")

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        """Feature maps of pictures (N, 3, H, W): all four, or a list with the last only."""
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
resnext101 = partial(ResNet, Bottleneck, (3, 4, 23, 3), groups=32)
