"""UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import DEFAULT_NORM, POOL_SCALES, NormLayer, average_pool, conv_bn_relu, init_weights, resize
from ..pyramid import through_pyramid
from .base import NORM_BIAS, Decoder

POOL_WIDTH = 512


class UPerNet(Decoder):
    """Pyramid pooling on the last feature map, a feature pyramid over all, and their fusion at the highest resolution.

    Args:
        in_channels: channels of every feature map the encoder returns; one map is enough.
        num_class: number of classes.
        fpn_dim: channels of the feature pyramid: 512, or 256 in the lite version.
        use_softmax: see `Decoder`.
        norm_layer: makes a normalization layer from a number of channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_class: int = 150,
        *,
        fpn_dim: int = 512,
        use_softmax: bool = False,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__(in_channels, num_class, use_softmax)
        *lateral, last = in_channels
        self.ppm_conv = nn.ModuleList(conv_bn_relu(last, POOL_WIDTH, 1, norm_layer=norm_layer) for _ in POOL_SCALES)
        self.ppm_last_conv = conv_bn_relu(last + len(POOL_SCALES) * POOL_WIDTH, fpn_dim, norm_layer=norm_layer)
        self.fpn_in = nn.ModuleList(conv_bn_relu(channels, fpn_dim, 1, norm_layer=norm_layer) for channels in lateral)
        self.fpn_out = nn.ModuleList(
            nn.Sequential(conv_bn_relu(fpn_dim, fpn_dim, norm_layer=norm_layer)) for _ in lateral
        )
        self.conv_last = nn.Sequential(
            conv_bn_relu(len(in_channels) * fpn_dim, fpn_dim, norm_layer=norm_layer), nn.Conv2d(fpn_dim, num_class, 1)
        )
        init_weights(self, norm_bias=NORM_BIAS)

    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the resolution of the first feature map."""
        top = self._pyramid_pooling(features[-1])
        fused = [top]
        for x, lateral, out in reversed(list(zip(features[:-1], self.fpn_in, self.fpn_out, strict=True))):
            top = lateral(x) + resize(top, x.shape[-2:])
            fused.insert(0, out(top))
        fuse, classify = self.conv_last
        return classify(through_pyramid(fuse, fused[0], fused[1:]))

    def _pyramid_pooling(self, x: Tensor) -> Tensor:
        # Resized before conv + norm + ReLU here, after it in PPM: the two orders differ, and the weights know theirs.
        pooled = [
            conv(resize(average_pool(x, bins), x.shape[-2:]))
            for conv, bins in zip(self.ppm_conv, POOL_SCALES, strict=True)
        ]
        return self.ppm_last_conv(torch.cat([x, *pooled], dim=1))
