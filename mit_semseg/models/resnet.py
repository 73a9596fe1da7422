"""Names of version 2: ResNets and their constructors."""

from .builder import ModelBuilder
from .encoders.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet18", "resnet50", "resnet101"]


def resnet18(pretrained: bool = False, **options) -> ResNet:
    """ResNet-18; `pretrained` from its ImageNet base."""
    return ModelBuilder.build_encoder("resnet18", pretrained=pretrained, **options)


def resnet50(pretrained: bool = False, **options) -> ResNet:
    """ResNet-50; `pretrained` from its ImageNet base."""
    return ModelBuilder.build_encoder("resnet50", pretrained=pretrained, **options)


def resnet101(pretrained: bool = False, **options) -> ResNet:
    """ResNet-101; `pretrained` from its ImageNet base."""
    return ModelBuilder.build_encoder("resnet101", pretrained=pretrained, **options)
