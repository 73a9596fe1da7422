"""Names of encoders and decoders, and functions that build them."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from ..lib.utils import UserError
from .decoders import ASPP, C1, PPM, PSP, C1Bilinear, C5Bilinear, Decoder, PSPBilinear, UPerNet, UPerNetLite
from .decoders.base import NORM_BIAS
from .encoders.hrnet import HRNetV2
from .encoders.mobilenet import MobileNetV2
from .encoders.resnet import resnet18, resnet34, resnet50, resnet101, resnext101
from .encoders.vgg import vgg16, vgg19
from .layers import init_layer
from .pretrained import load_imagenet_weights
from .weight_files import read_state_dict
from .weights import is_version_1, load_weights

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2dilated": partial(MobileNetV2, output_stride=8),
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
    # Version 1.0; its files of `resnet34` and `resnet50` are recognized by their weights.
    "vgg16_dilated8": vgg16,
    "vgg19_dilated8": vgg19,
    "resnet34_v1": partial(resnet34, stem=64),
    "resnet34_dilated16": partial(resnet34, stem=64, output_stride=16),
    "resnet34_dilated8": partial(resnet34, stem=64, output_stride=8),
    "resnet50_v1": partial(resnet50, stem=64),
    "resnet50_dilated16": partial(resnet50, stem=64, output_stride=16),
    "resnet50_dilated8": partial(resnet50, stem=64, output_stride=8),
    # Cityscapes toolbox
    "resnet101_cityscapes": partial(resnet101, output_stride=8, full_dilation=True),
}

DECODERS: dict[str, Callable[..., Decoder]] = {
    "c1": C1,
    "c1_deepsup": partial(C1, deepsup=True),
    "ppm": PPM,
    "ppm_deepsup": partial(PPM, deepsup=True),
    "upernet": UPerNet,
    "upernet_lite": UPerNetLite,
    # DeepLabV3 and PSPNet of the Cityscapes toolbox
    "aspp": ASPP,
    "aspp_deepsup": partial(ASPP, deepsup=True),
    "psp": PSP,
    "psp_deepsup": partial(PSP, deepsup=True),
    # Version 1.0
    "c1_bilinear": C1Bilinear,
    "c5_bilinear": C5Bilinear,
    "psp_bilinear": PSPBilinear,
}


class UnknownNameError(UserError, ValueError):
    """A name that is not in a table; the message lists the valid names."""


def lookup(table: Mapping[str, Callable], name: str, kind: str) -> Callable:
    """Return `table[name]`, or raise an `UnknownNameError` for a `kind` of entry, e.g. 'encoder'."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownNameError(f"unknown {kind} {name!r}{hint}; choose one of {', '.join(table)}")


class ModelBuilder:
    """Builds encoders and decoders by name."""

    @staticmethod
    def weights_init(m: nn.Module) -> None:
        """Initialize one layer like those of a decoder; to be passed to `module.apply`."""
        init_layer(m, mode="fan_in", norm_bias=NORM_BIAS)

    @staticmethod
    def build_encoder(
        arch: str = "resnet50dilated", fc_dim: int = 512, weights: str = "", *, pretrained: bool = True, **kwargs
    ) -> nn.Module:
        """Build an encoder.

        Args:
            arch: name in `ENCODERS`, in upper or lower case. With `weights` of version 1.0, `resnet34` and `resnet50`
                stand for its models.
            fc_dim: ignored, accepted for compatibility.
            weights: file with a state dict of the encoder; '' means ImageNet weights, downloaded if needed.
            pretrained: False starts from random weights if `weights` is ''.
            kwargs: passed to the encoder: `norm_layer`, and `output_stride` 8, 16 or 32 (HRNetV2 also 4, VGG only 8);
                None means the default of `arch`.

        Raises:
            ValueError: unknown name or unsupported output stride.
            WeightsError: the weights cannot be downloaded or read, or do not fit.
        """
        arch = arch.lower()
        state = read_state_dict(weights) if weights else None
        if state and f"{arch}_v1" in ENCODERS and is_version_1(state):
            arch = f"{arch}_v1"
        options = {key: value for key, value in kwargs.items() if value is not None}
        encoder = lookup(ENCODERS, arch, "encoder")(**options)
        if weights:
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
        **kwargs,
    ) -> Decoder:
        """Build a decoder.

        Args:
            arch: name in `DECODERS`, in upper or lower case.
            fc_dim: channels of the last feature map; ignored if `in_channels` is given.
            weights: file with a state dict of the decoder; '' starts from random weights.
            use_softmax: return probabilities instead of log-probabilities if the decoder is called without `segSize`.
            in_channels: channels of every feature map, the encoder's `out_channels`. Required for UPerNet with
                encoders other than ResNet-50, ResNet-101 and ResNeXt-101.
            reset_classifier: start from a random classifier if `weights` has a different number of classes.
            kwargs: passed to the decoder, e.g. the encoder's `output_stride` and `norm_layer`.

        Raises:
            ValueError: unknown name.
            WeightsError: the weights cannot be read or do not fit.
        """
        arch = arch.lower()
        if in_channels is None:
            # Feature maps of a ResNet-50; for deep supervision the second to last has half the channels of the last.
            in_channels = (256, 512, 1024 if "upernet" in arch else fc_dim // 2, fc_dim)
        decoder = lookup(DECODERS, arch, "decoder")(in_channels, num_class, use_softmax=use_softmax, **kwargs)
        if weights:
            load_weights(decoder, weights, name=f"decoder {arch}", part="decoder", reset_classifier=reset_classifier)
        return decoder


def constructor(arch: str) -> Callable[..., nn.Module]:
    """Return the constructor of version 2 of an encoder."""

    def construct(pretrained: bool = False, **kwargs) -> nn.Module:
        return ModelBuilder.build_encoder(arch, pretrained=pretrained, **kwargs)

    return construct
