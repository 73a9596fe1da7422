"""Old names of version 2."""

from .builder import constructor
from .encoders.hrnet import HighResolutionModule, HRNetV2

__all__ = ["HRNetV2", "HighResolutionModule", "hrnetv2"]

hrnetv2 = constructor("hrnetv2")
