"""Build encoders and decoders by name, and load their weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ..lib.utils import UserError, closest
from .decoders import (
    ASPP,
    C1,
    PPM,
    PSP,
    C1Bilinear,
    C5Bilinear,
    Decoder,
    PSPBilinear,
    UPerNet,
    UPerNetLite,
    UPerNetTiny,
)
from .decoders.base import NORM_BIAS
from .encoders.hrnet import HRNetV2
from .encoders.mobilenet import EfficientNetLite0, MobileNetV2
from .encoders.resnet import resnet18, resnet34, resnet50, resnet101, resnext101
from .encoders.vgg import vgg16, vgg19
from .layers import image_convolutions, init_layer, set_input_channels
from .pretrained import load_imagenet_weights
from .weight_files import read_state_dict
from .weight_names import convert_names
from .weights import is_version_1, load_weights

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2dilated": partial(MobileNetV2, output_stride=8),
    "efficientnet_lite0": EfficientNetLite0,
    "efficientnet_lite0dilated": partial(EfficientNetLite0, output_stride=8),
    "resnet18": resnet18,
    "resnet18dilated": partial(resnet18, output_stride=8),
    "resnet34": resnet34,
    "resnet34dilated": partial(resnet34, output_stride=8),
    "resnet50": resnet50,
    "resnet50dilated": partial(resnet50, output_stride=8),
    "resnet101": resnet101,
    "resnet101dilated": partial(resnet101, output_stride=8),
    "resnext101": resnext101,
    "hrnetv2": HRNetV2,
    # Encoders of version 1.0
    "vgg16_dilated8": vgg16,
    "vgg19_dilated8": vgg19,
    "resnet34_v1": partial(resnet34, stem=64),
    "resnet34_dilated16": partial(resnet34, stem=64, output_stride=16),
    "resnet34_dilated8": partial(resnet34, stem=64, output_stride=8),
    "resnet50_v1": partial(resnet50, stem=64),
    "resnet50_dilated16": partial(resnet50, stem=64, output_stride=16),
    "resnet50_dilated8": partial(resnet50, stem=64, output_stride=8),
    # Encoder of the Cityscapes toolbox
    "resnet101_cityscapes": partial(resnet101, output_stride=8, full_dilation=True),
}

DECODERS: dict[str, Callable[..., Decoder]] = {
    "c1": C1,
    "c1_deepsup": partial(C1, deepsup=True),
    "ppm": PPM,
    "ppm_deepsup": partial(PPM, deepsup=True),
    "upernet": UPerNet,
    "upernet_lite": UPerNetLite,
    "upernet_tiny": UPerNetTiny,
    # DeepLabV3 and PSPNet of the Cityscapes toolbox
    "aspp": ASPP,
    "aspp_deepsup": partial(ASPP, deepsup=True),
    "psp": PSP,
    "psp_deepsup": partial(PSP, deepsup=True),
    # Decoders of version 1.0
    "c1_bilinear": C1Bilinear,
    "c5_bilinear": C5Bilinear,
    "psp_bilinear": PSPBilinear,
}


TIMM = "timm:"  # prefix of the names of timm's networks


class UnknownNameError(UserError, ValueError):
    """The name of an encoder, decoder, loss or optimizer is unknown."""


def lookup(table: Mapping[str, Callable], name: str, kind: str) -> Callable:
    """Return `table[name]`, or raise an UnknownNameError that lists the valid names; `kind` is e.g. 'encoder'."""
    if name not in table:
        choices = ", ".join(table) + (f" or {TIMM}NAME for a network of timm" if kind == "encoder" else "")
        raise UnknownNameError(f"unknown {kind} {name!r}; choose one of {choices}{closest(name, table)}")
    return table[name]


class ModelBuilder:
    """Builds encoders and decoders by name."""

    @staticmethod
    def weights_init(m: nn.Module) -> None:
        """Initialize a decoder layer; used as `module.apply(ModelBuilder.weights_init)`."""
        init_layer(m, mode="fan_in", norm_bias=NORM_BIAS)

    @staticmethod
    def build_encoder(
        arch: str = "resnet50dilated",
        fc_dim: int = 512,
        weights: str = "",
        *,
        pretrained: bool = True,
        in_channels: int | None = None,
        **kwargs,
    ) -> nn.Module:
        """Build an encoder.

        Args:
            arch: name in `ENCODERS`, or `timm:NAME` for a network of timm, see `TimmEncoder`; case is ignored. With
                `weights` of version 1.0, `resnet34` and `resnet50` mean `resnet34_v1` and `resnet50_v1`.
            fc_dim: ignored; accepted for compatibility with version 2.
            weights: file with a state dict of the encoder, also of torchvision or timm for the same network; '' loads
                ImageNet weights and downloads them if needed.
            pretrained: if False and `weights` is '', start from random weights.
            in_channels: channels of the images; the first convolution of RGB weights is inflated, see
                `set_input_channels`. None: RGB images with ImageNet normalization.
            kwargs: `norm_layer`, and `output_stride` 8, 16 or 32 (HRNetV2 also 4, VGG only 8); None means the default.

        Raises a ValueError for an invalid name or output stride, and a WeightsError if the weights cannot be loaded.
        """
        if in_channels is not None:
            if weights and in_channels != 3:
                encoder = ModelBuilder.build_encoder(arch, pretrained=False, **kwargs)
                state, key = read_state_dict(weights), f"{image_convolutions(encoder)[0]}.weight"
                if state.get(key, state.get(f"encoder.{key}", torch.empty(0, 3))).size(1) == in_channels:
                    set_input_channels(encoder, in_channels)
                    load_weights(encoder, weights, name=f"encoder {arch}", part="encoder")
                    return encoder
            encoder = ModelBuilder.build_encoder(arch, weights=weights, pretrained=pretrained, **kwargs)
            return set_input_channels(encoder, in_channels)
        arch, options = arch.lower(), {key: value for key, value in kwargs.items() if value is not None}
        if arch.startswith(TIMM):
            return _timm_encoder()(arch.removeprefix(TIMM), weights=weights, pretrained=pretrained, **options)
        state = read_state_dict(weights) if weights else None
        if state and f"{arch}_v1" in ENCODERS and is_version_1(state):
            arch = f"{arch}_v1"
        encoder = lookup(ENCODERS, arch, "encoder")(**options)
        if weights:
            state = convert_names(state, encoder)
            load_weights(encoder, weights, state=state, name=f"encoder {arch}", part="encoder")
        elif pretrained:
            load_imagenet_weights(encoder, arch)
        return encoder

    @staticmethod
    def build_decoder(
        arch: str = "ppm_deepsup",
        fc_dim: int = 512,
        num_class: int = 150,
        weights: str = "",
        use_softmax: bool = False,
        *,
        in_channels: Sequence[int] | None = None,
        reset_classifier: bool = False,
        old_classes: Sequence[str] = (),
        **kwargs,
    ) -> Decoder:
        """Build a decoder.

        Args:
            arch: name in `DECODERS`; case is ignored.
            fc_dim: number of channels of the last feature map; ignored if `in_channels` is given.
            weights: file with a state dict of the decoder; '' means random weights.
            use_softmax: return probabilities instead of log-probabilities if the decoder is called without `segSize`.
            in_channels: channels of each feature map, i.e. `encoder.out_channels`. Required for UPerNet unless the
                encoder is ResNet-50, ResNet-101 or ResNeXt-101.
            reset_classifier: keep only the rows of the classifier in `weights` whose classes have the same names, see
                `load_weights`.
            old_classes: class names of `weights` if the file contains none.
            kwargs: options of `Decoder`, e.g. the encoder's `output_stride`, `norm_layer` and `class_names`.

        Raises a ValueError for an unknown name, and a WeightsError if the weights cannot be loaded.
        """
        arch = arch.lower()
        if in_channels is None:
            # Assume a ResNet: the second to last map (for deep supervision) has half as many channels as the last map.
            in_channels = (256, 512, 1024 if "upernet" in arch else fc_dim // 2, fc_dim)
        decoder = lookup(DECODERS, arch, "decoder")(in_channels, num_class, use_softmax=use_softmax, **kwargs)
        if weights:
            options = {"reset_classifier": reset_classifier, "old_classes": old_classes}
            load_weights(decoder, weights, name=f"decoder {arch}", part="decoder", **options)
        return decoder


def _timm_encoder() -> Callable[..., nn.Module]:
    try:
        from .encoders.timm_encoder import TimmEncoder
    except ImportError as error:
        raise UserError(f'encoders of timm need {error.name}; run pip install -e ".[timm]"') from None
    return TimmEncoder


def constructor(arch: str) -> Callable[..., nn.Module]:
    """Return a function that builds the encoder `arch` from the arguments of its version 2 constructor."""

    def construct(pretrained: bool = False, **kwargs) -> nn.Module:
        return ModelBuilder.build_encoder(arch, pretrained=pretrained, **kwargs)

    return construct
