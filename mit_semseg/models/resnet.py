"""Deprecated import path from version 2."""

from .builder import constructor
from .encoders.resnet import BasicBlock, Bottleneck, ResNet  # noqa: F401

resnet18, resnet50, resnet101 = constructor("resnet18"), constructor("resnet50"), constructor("resnet101")
