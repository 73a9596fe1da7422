"""Encoders: picture (N, 3, H, W) -> list of feature maps, highest resolution first.

Every encoder has `out_channels` (channels of each map it returns) and `output_stride` (of the last map), and
`forward(x, return_feature_maps=False)` returns the whole list when asked, else a list with the last map only.
"""

from .hrnet import HRNetV2, hrnetv2
from .mobilenet import MobileNetV2, mobilenetv2
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnext101
from .vgg import VGG, vgg16, vgg19

__all__ = [
    "VGG",
    "HRNetV2",
    "MobileNetV2",
    "ResNet",
    "hrnetv2",
    "mobilenetv2",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext101",
    "vgg16",
    "vgg19",
]
