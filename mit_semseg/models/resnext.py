"""Old names of version 2."""

from .builder import constructor
from .encoders.resnet import ResNet as ResNeXt

__all__ = ["ResNeXt", "resnext101"]

resnext101 = constructor("resnext101")
