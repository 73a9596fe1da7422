"""The decoders of version 1.0: scores upsampled bilinearly, with aligned corners, to the size of the label."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import DEFAULT_NORM, POOL_SCALES, NormLayer, conv_bn_relu, init_weights, norm_act, pooling_branches
from ..pyramid import through_pyramid
from .base import NORM_BIAS, Decoder

WIDTH = 512


class _Bilinear(Decoder):
    """Base of the three; their published results were obtained with aligned corners."""

    align_corners = True


class C1Bilinear(_Bilinear):
    """A single 1x1 convolution, without bias.

    Args:
        in_channels: channels of every feature map the encoder returns.
        num_class: number of classes.
        use_softmax: see `Decoder`.
        norm_layer: not used; every decoder takes it.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_class: int = 150,
        *,
        use_softmax: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__(in_channels, num_class, use_softmax)
        self.conv_last = nn.Conv2d(in_channels[-1], num_class, 1, bias=False)
        init_weights(self)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        return self.conv_last(features[-1])


class C5Bilinear(_Bilinear):
    """Four 3x3 convolutions, the first two dilated by 2, and a classifier without bias.

    Args:
        in_channels, num_class, use_softmax, norm_layer: as of `C1Bilinear`; the norms are used here.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_class: int = 150,
        *,
        use_softmax: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__(in_channels, num_class, use_softmax)
        channels = in_channels[-1]
        for i, dilation in enumerate((2, 2, 1, 1), start=1):
            conv = nn.Conv2d(channels, WIDTH, 3, padding=dilation, dilation=dilation, bias=False)
            norm, self.relu = norm_act(norm_layer, WIDTH)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
            channels = WIDTH
        self.conv_last = nn.Conv2d(WIDTH, num_class, 1, bias=False)
        init_weights(self, norm_bias=NORM_BIAS)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        x = features[-1]
        convs, norms = (self.conv1, self.conv2, self.conv3, self.conv4), (self.bn1, self.bn2, self.bn3, self.bn4)
        for conv, norm in zip(convs, norms, strict=True):
            x = self.relu(norm(conv(x)))
        return self.conv_last(x)


class PSPBilinear(_Bilinear):
    """Pyramid pooling (Zhao et al., 2017) as `PPM`, with aligned corners; arguments as of `C1Bilinear`."""

    def __init__(
        self,
        in_channels: Sequence[int],
        num_class: int = 150,
        *,
        use_softmax: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__(in_channels, num_class, use_softmax)
        channels = in_channels[-1]
        self.psp = pooling_branches(channels, WIDTH, norm_layer)
        self.conv_last = nn.Sequential(
            *conv_bn_relu(channels + len(POOL_SCALES) * WIDTH, WIDTH, norm_layer=norm_layer),
            nn.Dropout2d(0.1),
            nn.Conv2d(WIDTH, num_class, 1),
        )
        init_weights(self, norm_bias=NORM_BIAS)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the last feature map."""
        x = features[-1]
        pooled = [branch(x) for branch in self.psp]
        return through_pyramid(self.conv_last, x, pooled, align_corners=self.align_corners)
