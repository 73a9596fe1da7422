"""Encoders and decoders with the names and constructors of version 2."""

from collections.abc import Sequence

from torch import nn

from . import decoders
from .builder import ModelBuilder
from .encoders import MobileNetV2, ResNet
from .encoders.mobilenet import TAPS
from .layers import POOL_SCALES, dilate
from .segmentation import SegmentationModule, SegmentationModuleBase

__all__ = [
    "C1",
    "PPM",
    "C1DeepSup",
    "MobileNetV2Dilated",
    "ModelBuilder",
    "PPMDeepsup",
    "Resnet",
    "ResnetDilated",
    "SegmentationModule",
    "SegmentationModuleBase",
    "UPerNet",
]


class Resnet(ResNet):
    """Encoder that takes over the layers of a ResNet."""

    def __init__(self, orig_resnet: ResNet):
        nn.Module.__init__(self)
        vars(self).update(vars(orig_resnet))


class ResnetDilated(Resnet):
    """`Resnet` with an output stride of 8 or 16."""

    def __init__(self, orig_resnet: ResNet, dilate_scale: int = 8):
        super().__init__(orig_resnet)
        dilate((self.layer3, self.layer4), dilate_scale)
        self.output_stride = dilate_scale


class MobileNetV2Dilated(MobileNetV2):
    """Encoder that takes over the layers of a MobileNetV2, with an output stride of 8 or 16."""

    def __init__(self, orig_net: MobileNetV2, dilate_scale: int = 8):
        nn.Module.__init__(self)
        vars(self).update(vars(orig_net))
        first, second = TAPS[-2:]
        dilate((self.features[first:second], self.features[second:]), dilate_scale)
        self.output_stride = dilate_scale


class C1(decoders.C1):
    """Decoder defined by the channels of the last feature map."""

    _deepsup = False

    def __init__(self, num_class: int = 150, fc_dim: int = 2048, use_softmax: bool = False):
        super().__init__((fc_dim // 2, fc_dim), num_class, use_softmax=use_softmax, deepsup=self._deepsup)


class C1DeepSup(C1):
    """`C1` with deep supervision."""

    _deepsup = True


class PPM(decoders.PPM):
    """Decoder defined by the channels of the last feature map."""

    _deepsup = False

    def __init__(
        self,
        num_class: int = 150,
        fc_dim: int = 4096,
        use_softmax: bool = False,
        pool_scales: Sequence[int] = POOL_SCALES,
    ):
        _check(pool_scales)
        super().__init__((fc_dim // 2, fc_dim), num_class, use_softmax=use_softmax, deepsup=self._deepsup)


class PPMDeepsup(PPM):
    """`PPM` with deep supervision."""

    _deepsup = True


class UPerNet(decoders.UPerNet):
    """Decoder defined by the channels of all feature maps."""

    def __init__(
        self,
        num_class: int = 150,
        fc_dim: int = 2048,
        use_softmax: bool = False,
        pool_scales: Sequence[int] = POOL_SCALES,
        fpn_inplanes: Sequence[int] = (256, 512, 1024, 2048),
        fpn_dim: int = 256,
    ):
        _check(pool_scales)
        super().__init__((*fpn_inplanes[:-1], fc_dim), num_class, use_softmax=use_softmax, fpn_dim=fpn_dim)


def _check(pool_scales: Sequence[int]) -> None:
    if tuple(pool_scales) != POOL_SCALES:
        raise ValueError(f"pool_scales {tuple(pool_scales)}: pyramid pooling has {POOL_SCALES}")
