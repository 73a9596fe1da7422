"""Names of encoders and decoders, and how to build them."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from .decoders import ASPP, C1, PPM, PSP, C1Bilinear, C5Bilinear, Decoder, PSPBilinear, UPerNet
from .decoders.base import NORM_BIAS
from .encoders import hrnetv2, mobilenetv2, resnet18, resnet34, resnet50, resnet101, resnext101, vgg16, vgg19
from .layers import init_layer
from .pretrained import load_imagenet_weights
from .weights import is_of_version_1, load_weights

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2dilated": partial(mobilenetv2, output_stride=8),
    "resnet18": resnet18,
    "resnet18dilated": partial(resnet18, output_stride=8),
    "resnet34": resnet34,
    "resnet34dilated": partial(resnet34, output_stride=8),
    "resnet50": resnet50,
    "resnet50dilated": partial(resnet50, output_stride=8),
    "resnet101": resnet101,
    "resnet101dilated": partial(resnet101, output_stride=8),
    "resnext101": resnext101,
    "hrnetv2": hrnetv2,
    # Version 1.0; its resnet34 and resnet50 are told from the later ones by their weights, or by the ending.
    "vgg16_dilated8": vgg16,
    "vgg19_dilated8": vgg19,
    "resnet34_v1": partial(resnet34, stem=64),
    "resnet34_dilated16": partial(resnet34, stem=64, output_stride=16),
    "resnet34_dilated8": partial(resnet34, stem=64, output_stride=8),
    "resnet50_v1": partial(resnet50, stem=64),
    "resnet50_dilated16": partial(resnet50, stem=64, output_stride=16),
    "resnet50_dilated8": partial(resnet50, stem=64, output_stride=8),
    # The Cityscapes toolbox.
    "resnet101_cityscapes": partial(resnet101, output_stride=8, full_dilation=True),
}

DECODERS: dict[str, Callable[..., Decoder]] = {
    "c1": C1,
    "c1_deepsup": partial(C1, deepsup=True),
    "ppm": PPM,
    "ppm_deepsup": partial(PPM, deepsup=True),
    "upernet": UPerNet,
    "upernet_lite": partial(UPerNet, fpn_dim=256),
    # DeepLabV3 and PSPNet as the Cityscapes toolbox has them.
    "aspp": ASPP,
    "aspp_deepsup": partial(ASPP, deepsup=True),
    "psp": PSP,
    "psp_deepsup": partial(PSP, deepsup=True),
    # Version 1.0.
    "c1_bilinear": C1Bilinear,
    "c5_bilinear": C5Bilinear,
    "psp_bilinear": PSPBilinear,
}


def _lookup(table: dict[str, Callable], name: str, kind: str) -> Callable:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no {kind} {name!r}; {hint}the {kind}s are {', '.join(table)}")


class ModelBuilder:
    """Builds encoders and decoders by name."""

    @staticmethod
    def weights_init(m: nn.Module) -> None:
        """Initialize one layer as in the decoders; for `module.apply`."""
        init_layer(m, "fan_in", NORM_BIAS)

    @staticmethod
    def build_encoder(
        arch: str = "resnet50dilated",
        fc_dim: int = 512,
        weights: str = "",
        *,
        pretrained: bool = True,
        output_stride: int | None = None,
        **kwargs,
    ) -> nn.Module:
        """Build an encoder.

        Args:
            arch: a name in `ENCODERS`, any case. With weights of version 1.0, `resnet34` and `resnet50` are its models.
            fc_dim: not needed (an encoder knows its channels); accepted for old callers.
            weights: file with the encoder's state dict; '' means the ImageNet base of `arch`, downloaded when needed.
            pretrained: False starts from random weights instead of the ImageNet base.
            output_stride: 8, 16 or 32 (HRNetV2 also 4); None takes what the name says.
            kwargs: passed to the encoder, e.g. `norm_layer`.

        Raises:
            ValueError: unknown name or output stride.
            mit_semseg.models.weight_files.WeightsError: the weights cannot be had or do not fit.
        """
        arch = arch.lower()
        if weights and f"{arch}_v1" in ENCODERS and is_of_version_1(weights):
            arch = f"{arch}_v1"
        build = _lookup(ENCODERS, arch, "encoder")
        if output_stride:
            allowed = {"hrnetv2": (4, 8, 16, 32), "vgg16_dilated8": (8,), "vgg19_dilated8": (8,)}.get(arch, (8, 16, 32))
            if output_stride not in allowed:
                raise ValueError(
                    f"output stride {output_stride} of {arch}: choose one of {', '.join(map(str, allowed))}"
                )
            kwargs["output_stride"] = output_stride
        encoder = build(**kwargs)
        if weights:
            load_weights(encoder, weights, what=f"encoder {arch}", part="encoder")
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
        output_stride: int = 8,
        reset_classifier: bool = False,
        **kwargs,
    ) -> Decoder:
        """Build a decoder.

        Args:
            arch: a name in `DECODERS`, any case.
            fc_dim: channels of the encoder's last feature map; used when `in_channels` is not given.
            num_class: number of classes.
            weights: file with the decoder's state dict; '' starts from random weights.
            use_softmax: a call without `segSize` returns probabilities instead of log-probabilities.
            in_channels: channels of every feature map, the encoder's `out_channels`; needed for UPerNet on anything but
                ResNet-50/101 and ResNeXt-101.
            output_stride: of the last feature map, the encoder's `output_stride`; ASPP dilates accordingly.
            reset_classifier: start the classifier anew where `weights` has another number of classes.
            kwargs: passed to the decoder, e.g. `norm_layer`.

        Raises:
            ValueError: unknown name.
            mit_semseg.models.weight_files.WeightsError: the weights cannot be read or do not fit.
        """
        build = _lookup(DECODERS, arch.lower(), "decoder")
        if in_channels is None:
            # Old callers name the last map only: the others were those of a ResNet-50, or half for deep supervision.
            in_channels = (256, 512, 1024 if "upernet" in arch.lower() else fc_dim // 2, fc_dim)
        if "output_stride" in inspect.signature(build).parameters:
            kwargs["output_stride"] = output_stride
        decoder = build(in_channels, num_class, use_softmax=use_softmax, **kwargs)
        if weights:
            what = f"decoder {arch.lower()}"
            load_weights(decoder, weights, what=what, reset_classifier=reset_classifier, part="decoder")
        return decoder
