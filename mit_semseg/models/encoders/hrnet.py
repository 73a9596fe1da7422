"""HRNetV2-W48 (Sun et al., "High-Resolution Representations for Labeling Pixels and Regions", 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...lib.nn import Blocks
from ..layers import DEFAULT_NORM, NormLayer, conv_bn_relu, init_weights, plain_norm, resize
from ..pyramid import Concatenated
from .resnet import BasicBlock, Bottleneck, make_layer

# FX keeps `resize` as a call: it branches on sizes, which are symbolic during tracing.
torch.fx.wrap("resize")

WIDTHS = (48, 96, 192, 384)  # channels of the branches at strides 4, 8, 16, 32
MODULES = (1, 4, 3)  # high-resolution modules in stages 2, 3, 4


def _conv_bn(in_channels, out_channels, kernel_size, stride, norm_layer) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, plain_norm(norm_layer, out_channels))


class HighResolutionModule(nn.Module):
    """Parallel branches of four residual blocks, then every branch receives the sum of all, resized to its own size."""

    def __init__(self, branches: int, norm_layer: NormLayer):
        super().__init__()
        self.branches = nn.ModuleList(
            make_layer(BasicBlock, width, width, 4, norm_layer=norm_layer) for width in WIDTHS[:branches]
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleDict({str(j): self._fuse(j, i, norm_layer) for j in range(branches) if j != i})
            for i in range(branches)
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _fuse(source: int, target: int, norm_layer: NormLayer) -> nn.Sequential:
        if source > target:
            return _conv_bn(WIDTHS[source], WIDTHS[target], 1, 1, norm_layer)
        steps = [
            conv_bn_relu(WIDTHS[source], WIDTHS[source], stride=2, norm_layer=norm_layer)
            for _ in range(target - source - 1)
        ]
        return nn.Sequential(*steps, _conv_bn(WIDTHS[source], WIDTHS[target], 3, 2, norm_layer))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One map per branch in, one of the same shape out."""
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, layers in enumerate(self.fuse_layers):
            size = maps[i].shape[-2:]
            terms = [x if j == i else resize(layers[str(j)](x), size) for j, x in enumerate(maps)]
            fused.append(self.relu(sum(terms[1:], terms[0])))
        return fused


class HRNetV2(nn.Module):
    """One feature map: the four branches resized to one resolution and concatenated, 720 channels.

    Args:
        output_stride: resolution the branches are gathered at: 4 (as published), 8, 16 or 32. The weights are the same.
        norm_layer: makes a normalization layer from a number of channels.
    """

    out_channels = (sum(WIDTHS),)
    can_be_lazy = True

    def __init__(self, *, output_stride: int = 4, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        self.output_stride = output_stride
        self.conv1, self.bn1, self.relu1 = conv_bn_relu(3, 64, stride=2, norm_layer=norm_layer)
        self.conv2, self.bn2, self.relu2 = conv_bn_relu(64, 64, stride=2, norm_layer=norm_layer)
        self.layer1 = make_layer(Bottleneck, 64, 64, 4, norm_layer=norm_layer)
        self.transition1 = nn.ModuleDict(
            {
                "0": conv_bn_relu(256, WIDTHS[0], norm_layer=norm_layer),
                "1": nn.Sequential(conv_bn_relu(256, WIDTHS[1], stride=2, norm_layer=norm_layer)),
            }
        )
        self.stage2 = self._stage(2, norm_layer)
        self.transition2 = self._new_branch(2, norm_layer)
        self.stage3 = self._stage(3, norm_layer)
        self.transition3 = self._new_branch(3, norm_layer)
        self.stage4 = self._stage(4, norm_layer)
        init_weights(self, mode="fan_out")

    @staticmethod
    def _stage(branches: int, norm_layer: NormLayer) -> Blocks:
        return Blocks(*(HighResolutionModule(branches, norm_layer) for _ in range(MODULES[branches - 2])))

    @staticmethod
    def _new_branch(index: int, norm_layer: NormLayer) -> nn.ModuleDict:
        step = conv_bn_relu(WIDTHS[index - 1], WIDTHS[index], stride=2, norm_layer=norm_layer)
        return nn.ModuleDict({str(index): nn.Sequential(step)})

    def forward(self, x: Tensor, return_feature_maps: bool = False, *, lazily: bool = False) -> Sequence[Tensor]:
        """A list with the only feature map (N, 720, H / output_stride, W / output_stride) of pictures (N, 3, H, W);
        lazily, it is made when it is taken from the list."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        maps = self.stage2([self.transition1["0"](x), self.transition1["1"](x)])
        maps = self.stage3([*maps, self.transition2["2"](maps[-1])])
        maps = self.stage4([*maps, self.transition3["3"](maps[-1])])
        which = {4: 0, 8: 1, 16: 2, 32: 3}[self.output_stride]
        if lazily is True:  # during FX tracing it is a proxy
            return Concatenated(maps, which)
        size = maps[which].shape[-2:]
        return [torch.cat([resize(x, size) for x in maps], dim=1)]


hrnetv2 = HRNetV2
