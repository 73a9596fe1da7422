"""UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", 2018)."""

import torch
from torch import Tensor, nn

from ..layers import POOL_SCALES, NormLayer, average_pool, conv_bn_relu, resize
from ..pyramid import pyramid_sequential
from .base import Decoder


class UPerNet(Decoder):
    """Pyramid pooling of the last feature map, then a feature pyramid (FPN); its maps are fused at the largest size."""

    pool_dim = 512  # number of channels of each pooled map
    fpn_dim = 512  # number of channels of each map in the feature pyramid

    def make_layers(self, norm_layer: NormLayer) -> None:
        dim, (*lateral, last) = self.fpn_dim, self.in_channels
        self.ppm_conv = nn.ModuleList(conv_bn_relu(last, self.pool_dim, 1, norm_layer=norm_layer) for _ in POOL_SCALES)
        self.ppm_last_conv = conv_bn_relu(last + len(POOL_SCALES) * self.pool_dim, dim, norm_layer=norm_layer)
        self.fpn_in = nn.ModuleList(conv_bn_relu(channels, dim, 1, norm_layer=norm_layer) for channels in lateral)
        self.fpn_out = nn.ModuleList(nn.Sequential(conv_bn_relu(dim, dim, norm_layer=norm_layer)) for _ in lateral)
        self.conv_last = nn.Sequential(
            conv_bn_relu(len(self.in_channels) * dim, dim, norm_layer=norm_layer), nn.Conv2d(dim, self.num_class, 1)
        )

    def head(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        # Resize the pooled maps before their convolution, norm and ReLU; `PPM` resizes them after these layers.
        pooled = (resize(average_pool(x, bins), x.shape[-2:]) for bins in POOL_SCALES)
        pooled = [conv(y) for conv, y in zip(self.ppm_conv, pooled, strict=True)]
        top = self.ppm_last_conv(torch.cat([x, *pooled], dim=1))
        pyramid = [top]
        for i in reversed(range(len(self.fpn_in))):
            top = self.fpn_in[i](features[i]) + resize(top, features[i].shape[-2:])
            pyramid.insert(0, self.fpn_out[i](top))
        fuse, classify = self.conv_last
        return classify(pyramid_sequential(fuse, pyramid[0], pyramid[1:]))


class UPerNetLite(UPerNet):
    """`UPerNet` with half as many channels in the feature pyramid."""

    fpn_dim = 256


class UPerNetTiny(UPerNet):
    """`UPerNet` with 64 channels in the pooled maps and in the feature pyramid, for small encoders."""

    pool_dim = fpn_dim = 64
