"""VGG (Simonyan & Zisserman, 2014) at output stride 8, its fully connected layers turned into convolutions."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..layers import DEFAULT_NORM, NormLayer, init_weights

WIDTHS = (64, 128, 256, 512, 512)
DILATION = 2  # of the fifth block, whose input is not pooled
FC = 4096


class VGG(nn.Module):
    """Feature maps at strides 4, 8, 8 and 8: blocks three, four and five, and the former fully connected layers.

    The fourth and fifth pooling are left out; block five is dilated by 2 and the 7x7 convolution after it by 4, as in
    Chen et al., "DeepLab", 2016. There is no normalization.

    Args:
        depths: convolutions in each of the five blocks.
        output_stride: 8, the only one there is.
        norm_layer: not used; every encoder takes it.

    Raises:
        ValueError: another output stride.
    """

    out_channels = (256, 512, 512, FC)

    def __init__(self, depths: Sequence[int], *, output_stride: int = 8, norm_layer: NormLayer = DEFAULT_NORM):
        super().__init__()
        if output_stride != 8:
            raise ValueError(f"output stride {output_stride} of VGG: it has 8 only")
        self.output_stride = output_stride
        layers, channels, self._ends = [], 3, []
        for block, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            dilation = DILATION if block == 4 else 1
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                channels = width
            self._ends.append(len(layers))
            if block < 3:
                layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        self.conv6 = nn.Conv2d(WIDTHS[-1], FC, 7, padding=12, dilation=4)
        self.conv7 = nn.Conv2d(FC, FC, 1)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)
        init_weights(self, mode="fan_out")

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        """Feature maps of pictures (N, 3, H, W): all four, or a list with the last only."""
        maps = []
        for number, layer in enumerate(self.features, start=1):
            x = layer(x)
            if number in self._ends[2:]:
                maps.append(x)
        x = self.dropout(self.relu(self.conv6(x)))
        x = self.dropout(self.relu(self.conv7(x)))
        return [*maps, x] if return_feature_maps else [x]


vgg16 = partial(VGG, (2, 2, 3, 3, 3))
vgg19 = partial(VGG, (2, 2, 4, 4, 4))
