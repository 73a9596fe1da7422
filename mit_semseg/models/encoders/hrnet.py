"""HRNetV2-W48 (Sun et al., "High-Resolution Representations for Labeling Pixels and Regions", 2019)."""

import re

import torch
from torch import Tensor, nn

from ..layers import DEFAULT_NORM, NormLayer, check_output_stride, conv_bn, conv_bn_relu, init_layer, resize
from .resnet import BasicBlock, Bottleneck, make_layer

# FX cannot trace the size comparison in `resize`; make it record the call of `resize` instead.
torch.fx.wrap("resize")

STRIDES = (4, 8, 16, 32)  # strides of the branches
WIDTHS = (48, 96, 192, 384)  # numbers of channels of the branches


class HighResolutionModule(nn.Module):
    """Parallel branches with four residual blocks each; every output is the sum of all branches after resizing."""

    is_block = True  # activation checkpointing and compilation apply to blocks

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
            return conv_bn(WIDTHS[source], WIDTHS[target], 1, norm_layer=norm_layer)
        width, options = WIDTHS[source], {"stride": 2, "norm_layer": norm_layer}
        convs = [conv_bn_relu(width, width, **options) for _ in range(target - source - 1)]
        return nn.Sequential(*convs, conv_bn(width, WIDTHS[target], 3, **options))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, layers in enumerate(self.fuse_layers):
            size = maps[i].shape[-2:]
            terms = [x if j == i else resize(layers[str(j)](x), size) for j, x in enumerate(maps)]
            fused.append(self.relu(sum(terms[1:], terms[0])))
        return fused


def _new_branch(index: int, norm_layer: NormLayer) -> nn.ModuleDict:
    conv = conv_bn_relu(WIDTHS[index - 1], WIDTHS[index], stride=2, norm_layer=norm_layer)
    return nn.ModuleDict({str(index): nn.Sequential(conv)})


class HRNetV2(nn.Module):
    """HRNetV2 with one feature map of 720 channels: four branches, resized to `output_stride` and concatenated."""

    out_channels = (sum(WIDTHS),)

    def __init__(self, *, output_stride: int = 4, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        self.output_stride = check_output_stride(output_stride, STRIDES)
        self.conv1, self.bn1, self.relu1 = conv_bn_relu(3, 64, stride=2, norm_layer=norm_layer)
        self.conv2, self.bn2, self.relu2 = conv_bn_relu(64, 64, stride=2, norm_layer=norm_layer)
        self.layer1 = make_layer(Bottleneck, 64, 64, 4, norm_layer=norm_layer)
        self.transition1 = nn.ModuleDict({"0": conv_bn_relu(256, WIDTHS[0], norm_layer=norm_layer)})
        self.transition1["1"] = nn.Sequential(conv_bn_relu(256, WIDTHS[1], stride=2, norm_layer=norm_layer))
        self.stage2 = nn.Sequential(HighResolutionModule(2, norm_layer))
        self.transition2 = _new_branch(2, norm_layer)
        self.stage3 = nn.Sequential(*(HighResolutionModule(3, norm_layer) for _ in range(4)))
        self.transition3 = _new_branch(3, norm_layer)
        self.stage4 = nn.Sequential(*(HighResolutionModule(4, norm_layer) for _ in range(3)))
        self.apply(init_layer)

    def stage_of(self, name: str) -> int:
        """Return the stage (0: stem) of the parameter with this name; see `build_optimizer`."""
        match = re.match(r"(layer|stage|transition)(\d)", name)
        return int(match[2]) + (match[1] == "transition") if match else 0

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        maps = self.stage2([self.transition1["0"](x), self.transition1["1"](x)])
        maps = self.stage3([*maps, self.transition2["2"](maps[-1])])
        maps = self.stage4([*maps, self.transition3["3"](maps[-1])])
        size = maps[STRIDES.index(self.output_stride)].shape[-2:]
        return [torch.cat([resize(x, size) for x in maps], dim=1)]
