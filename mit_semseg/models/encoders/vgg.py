"""VGG (Simonyan & Zisserman, 2014) at output stride 8, with its fully connected layers converted to convolutions."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..layers import DEFAULT_NORM, NormLayer, check_output_stride, init_layer

WIDTHS = (64, 128, 256, 512, 512)
FC_WIDTH = 4096


class VGG(nn.Module):
    """VGG with four feature maps at strides 4, 8, 8, 8: outputs of blocks three to five and of the last convolution.

    As in DeepLab (Chen et al., 2016), blocks four and five are not followed by pooling, block five has dilation 2, and
    the following 7x7 convolution has dilation 4. The network has no normalization layers. `depths` lists the number of
    convolutions in each of the five blocks.
    """

    out_channels = (256, 512, 512, FC_WIDTH)

    def __init__(self, depths: Sequence[int], *, output_stride: int = 8, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        self.output_stride = check_output_stride(output_stride, (8,))
        layers, channels, self.block_ends = [], 3, []
        for block, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            dilation = 2 if block == 4 else 1
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                channels = width
            self.block_ends.append(len(layers))
            if block < 3:
                layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        self.conv6 = nn.Conv2d(WIDTHS[-1], FC_WIDTH, 7, padding=12, dilation=4)
        self.conv7 = nn.Conv2d(FC_WIDTH, FC_WIDTH, 1)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.apply(init_layer)

    def stage_of(self, name: str) -> int:
        """Return the stage (0: stem) of the parameter with this name; see `build_optimizer`."""
        part, index = name.split(".")[:2]
        return bisect_right(self.block_ends, int(index)) if part == "features" else len(self.block_ends)

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(self.features, start=1):
            x = layer(x)
            if number in self.block_ends[2:]:
                maps.append(x)
        x = self.dropout(self.relu(self.conv6(x)))
        x = self.dropout(self.relu(self.conv7(x)))
        return [*maps, x] if return_feature_maps else [x]


vgg16 = partial(VGG, (2, 2, 3, 3, 3))
vgg19 = partial(VGG, (2, 2, 4, 4, 4))
