"""Deprecated import path from version 2."""

from .builder import constructor
from .encoders.hrnet import HighResolutionModule, HRNetV2  # noqa: F401

hrnetv2 = constructor("hrnetv2")
