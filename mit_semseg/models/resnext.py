"""Names of version 2: ResNeXt-101 and its constructor."""

from .builder import ModelBuilder
from .encoders.resnet import ResNet as ResNeXt

__all__ = ["ResNeXt", "resnext101"]


def resnext101(pretrained: bool = False, **options) -> ResNeXt:
    """ResNeXt-101 32x4d; `pretrained` from its ImageNet base."""
    return ModelBuilder.build_encoder("resnext101", pretrained=pretrained, **options)
