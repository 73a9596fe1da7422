"""Deprecated import path from version 2: encoders and decoders with their version 2 arguments."""

from collections.abc import Sequence
from functools import partialmethod

from torch import nn

from . import decoders
from .builder import ModelBuilder as ModelBuilder
from .encoders.mobilenet import MobileNetV2
from .encoders.resnet import ResNet
from .layers import POOL_SCALES, check_output_stride, dilation_of_stage
from .segmentation import SegmentationModule as SegmentationModule
from .segmentation import SegmentationModuleBase as SegmentationModuleBase

CHANNELS = (256, 512, 1024, 2048)  # number of channels of each feature map in ResNet-50


def _dilate(encoder: nn.Module, stages: Sequence[nn.Module], output_stride: int) -> None:
    """Replace strides in `stages`, the last two stages, by dilation, so that the encoder has this output stride."""
    encoder.output_stride = check_output_stride(output_stride, (8, 16))
    for stage, input_stride in zip(stages, (8, 16), strict=True):
        stride, first, others = dilation_of_stage(2, input_stride, output_stride)
        for conv in (layer for layer in stage.modules() if isinstance(layer, nn.Conv2d)):
            strided = conv.stride == (2, 2)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (first if strided else others,) * 2
            if strided:
                conv.stride = (stride, stride)


class Resnet(ResNet):
    """Encoder that shares the layers of an existing ResNet."""

    def __init__(self, orig_resnet: ResNet):
        nn.Module.__init__(self)
        vars(self).update(vars(orig_resnet))


class ResnetDilated(Resnet):
    """Encoder that shares the layers of an existing ResNet, and dilates them for output stride 8 or 16."""

    def __init__(self, orig_resnet: ResNet, dilate_scale: int = 8):
        super().__init__(orig_resnet)
        _dilate(self, (self.layer3, self.layer4), dilate_scale)


class MobileNetV2Dilated(MobileNetV2):
    """Encoder that shares the layers of an existing MobileNetV2, and dilates them for output stride 8 or 16."""

    def __init__(self, orig_net: MobileNetV2, dilate_scale: int = 8):
        nn.Module.__init__(self)
        vars(self).update(vars(orig_net))
        first, second = self.taps[-2:]
        _dilate(self, (self.features[first:second], self.features[second:]), dilate_scale)


class C1(decoders.C1):
    """`decoders.C1` with its version 2 arguments; `fc_dim` is the number of channels of the last feature map."""

    def __init__(self, num_class: int = 150, fc_dim: int = 2048, use_softmax: bool = False, *, deepsup: bool = False):
        super().__init__((fc_dim // 2, fc_dim), num_class, use_softmax=use_softmax, deepsup=deepsup)


class C1DeepSup(C1):
    """`C1` with deep supervision."""

    __init__ = partialmethod(C1.__init__, deepsup=True)


class PPM(decoders.PPM):
    """`decoders.PPM` with its version 2 arguments; `fc_dim` is the number of channels of the last feature map."""

    def __init__(self, num_class=150, fc_dim=4096, use_softmax=False, pool_scales=POOL_SCALES, *, deepsup=False):
        _check(pool_scales)
        super().__init__((fc_dim // 2, fc_dim), num_class, use_softmax=use_softmax, deepsup=deepsup)


class PPMDeepsup(PPM):
    """`PPM` with deep supervision."""

    __init__ = partialmethod(PPM.__init__, deepsup=True)


class UPerNet(decoders.UPerNet):
    """`decoders.UPerNet` with its version 2 arguments; the feature maps have (*fpn_inplanes[:-1], fc_dim) channels."""

    def __init__(
        self, num_class=150, fc_dim=2048, use_softmax=False, pool_scales=POOL_SCALES, fpn_inplanes=CHANNELS, fpn_dim=256
    ):
        _check(pool_scales)
        self.fpn_dim = fpn_dim  # read by `make_layers`
        super().__init__((*fpn_inplanes[:-1], fc_dim), num_class, use_softmax=use_softmax)


def _check(pool_scales: Sequence[int]) -> None:
    if tuple(pool_scales) != POOL_SCALES:
        raise ValueError(f"pool_scales {tuple(pool_scales)} are not supported; use {POOL_SCALES}")
