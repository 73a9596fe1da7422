"""Names of version 2: HRNetV2 and its constructor."""

from .builder import ModelBuilder
from .encoders.hrnet import HighResolutionModule, HRNetV2

__all__ = ["HRNetV2", "HighResolutionModule", "hrnetv2"]


def hrnetv2(pretrained: bool = False, **options) -> HRNetV2:
    """HRNetV2-W48; `pretrained` from its ImageNet base."""
    return ModelBuilder.build_encoder("hrnetv2", pretrained=pretrained, **options)
