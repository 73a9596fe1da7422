"""Names of version 2: MobileNetV2 and its constructor."""

from .encoders.mobilenet import InvertedResidual, MobileNetV2
from .pretrained import load_imagenet_weights

__all__ = ["InvertedResidual", "MobileNetV2", "mobilenetv2"]


def mobilenetv2(pretrained: bool = False, **options) -> MobileNetV2:
    """MobileNetV2 with output stride 32; `pretrained` from its ImageNet base."""
    encoder = MobileNetV2(**options)
    if pretrained:
        load_imagenet_weights(encoder, "mobilenetv2dilated")
    return encoder
