"""Deprecated import path from version 2."""

from .builder import constructor
from .encoders.resnet import ResNet as ResNeXt  # noqa: F401

resnext101 = constructor("resnext101")
