"""Deprecated import path from version 2."""

from functools import partial

from .builder import constructor
from .encoders.mobilenet import InvertedResidual, MobileNetV2  # noqa: F401

mobilenetv2 = partial(constructor("mobilenetv2dilated"), output_stride=32)
