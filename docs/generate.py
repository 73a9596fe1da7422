"""Generate docs/models.md and docs/options.md from the code. Takes about half a minute.

python docs/generate.py
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mit_semseg.config import load_config
from mit_semseg.config.defaults import OPTIONS, Option
from mit_semseg.engine.losses import LOSSES
from mit_semseg.engine.optim import OPTIMIZERS
from mit_semseg.models.builder import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.models.pretrained import imagenet_sources

DOCS = Path(__file__).resolve().parent
CONFIGS = DOCS.parent / "config"
INPUT_SIZE = (512, 688)  # a 512x683 image, padded to a multiple of 8
CHOICES = {  # allowed values of options that name an entry of a table
    "MODEL.arch_decoder": DECODERS,
    "TRAIN.optim": OPTIMIZERS,
    "TRAIN.loss": LOSSES,
}
# "single scale 41.26 / 79.73 / 60.50", "32.77 / 76.47" or "mean IoU 78.3"
METRICS = re.compile(r"(?:single scale |multi-scale )?\d\d\.\d\d(?: / \d\d\.\d\d)+|(?<=mean IoU )\d\d\.\d")
KINDS = {int: "integer", float: "number", str: "path"}

MODELS_PAGE = """\
# Encoders and decoders

    python train.py --cfg mine.yaml DIR ckpt/upernet MODEL.arch_encoder resnet50 MODEL.arch_decoder upernet

`mine.yaml` is your configuration, see [train on your own images](own-data.md). Every encoder works with every decoder.
`eval.py` and `test.py` need the same options, so it is best to write them into a copy of the file. The
[columns](#columns) are explained after the tables.

## Encoders

{encoders}

Names with `_v1`, `_dilated8` or `_dilated16` are encoders of [version 1.0](version-1.md). `resnet101_cityscapes` is the
encoder of PSPNet and DeepLabV3 for [Cityscapes](datasets.md#cityscapes).

## Networks of timm

    pip install -e ".[timm]"
    python train.py --cfg mine.yaml DIR ckpt/convnext MODEL.arch_encoder timm:convnext_tiny MODEL.arch_decoder upernet

`timm:NAME` is a network of [timm](https://huggingface.co/docs/timm), optionally with the tag of its weights, such as
`timm:convnext_tiny.in12k_ft_in1k`. In Python, `timm.list_pretrained()` lists the names. Networks that cannot process
images of any size are refused with an error. These are examples:

{timm}

| You want | Encoder and decoder |
| --- | --- |
| training on a CPU, or only PyPI is reachable | `efficientnet_lite0` with `upernet_tiny` |
| a fast network | `timm:mobilenetv4_conv_small` with `upernet_tiny` |
| a high mean IoU | `timm:convnext_tiny` or larger with `upernet`, `lr_encoder 0.0001`, `lr_decoder 0.0001` |
| self-supervised weights | `timm:vit_small_patch14_dinov2` with `upernet`, `DATASET.padding_constant 56` |
| the published networks | `resnet50dilated` with `ppm_deepsup`, see the [configurations](#configurations) |

- Output stride: most convolutional networks support `MODEL.output_stride` 8 and 16. A small output stride improves thin
  objects with `c1`, `ppm` and `aspp`, and costs more time. `upernet` combines the maps at strides 4 to 32.
- Plain vision transformers: all maps have the same stride. `DATASET.padding_constant`, `DATASET.crop_size` and
  `INFERENCE.window_size` must be multiples of the patch size, such as 56 for patches of 14 pixels.
- Normalization: the encoder converts images with ImageNet normalization to the normalization of its weights. Therefore,
  keep the default of `DATASET.normalization`. With `MODEL.weights_encoder`, name the tag of these weights in
  `MODEL.arch_encoder` (`timm:NAME.TAG`), because the tag selects the normalization.
- `MODEL.norm inplace` is not supported. `MODEL.norm sync` synchronizes the batch norms of a network, if it has any.
- Licenses: each network of timm and its weights have their own license.

## Decoders

{decoders}

Parameters and GFLOPs are for the feature maps of the encoder `resnet50dilated` and 150 classes.

- `c1`: a 3x3 convolution.
- `ppm`: pyramid pooling, as in PSPNet. `psp` is the variant of the Cityscapes networks.
- `aspp`: convolutions with several dilations, as in DeepLabV3.
- `upernet`: pyramid pooling and a feature pyramid with 512 channels; `_lite` has 256, `_tiny` has 64.
- `_deepsup`: a second classifier on an earlier feature map, for training only.
- `_bilinear`: decoders of [version 1.0](version-1.md).

Set `DATASET.segm_downsampling_rate` to 4 for `upernet`, and otherwise to the output stride of the encoder. For other
values, the logits are resized to the labels.

## Configurations

{configs}

"Published metrics" are those of the authors, in %: mean IoU / pixel accuracy / overall score. Missing numbers were not
published. The metrics were not measured with this repository. Configurations with `2026` in their names use newer
training options, and were not trained.

34.84 is probably a typing error in the published table: with an overall score of 54.07, the mean IoU would be 32.39.

## Columns

- Parameters: number in millions, including layers that only training uses (deep supervision).
- GFLOPs: 10⁹ floating point operations of convolutions and matrix products. The input is one image of 512x683 pixels,
  padded to 512x688, or 518x700 for a patch size of 14. A multiplication and an addition count as two operations.
- Channels: channels of the feature maps, highest resolution first.
- Output stride: height of the image / height of the last feature map.
- ImageNet weights: whether pretrained weights are available, from the authors' server, torchvision, timm or a package.

This page is generated by `python docs/generate.py`.
"""
OPTIONS_PAGE = """\
# Options

    python train.py --cfg FILE TRAIN.num_epoch 10 DATASET.imgSizes "(300, 375)"

Set options at the end of a command, as in this example, or in the YAML file. Lists are written as `"(300, 375)"` in a
command and as `[300, 375]` in YAML.

{tables}

This page is generated by `python docs/generate.py`.
"""


TIMM_EXAMPLES = (
    *("mobilenetv4_conv_small", "efficientnet_b0", "resnet50", "convnext_tiny"),
    *("swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"),
)


class Part(NamedTuple):
    """An encoder or decoder on PyTorch's meta device, its output for an image of `INPUT_SIZE`, and its cost."""

    module: nn.Module
    output: object
    gflops: float


def _measure(module: nn.Module, call: Callable[[], object]) -> Part:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = call()
    return Part(module, output, counter.get_total_flops() / 1e9)


@cache
def build_encoder(name: str, output_stride: int | None = None) -> Part:
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(name, pretrained=False, output_stride=output_stride).eval()
        divisor = getattr(encoder, "size_divisor", 1)
        image = torch.empty(1, 3, *(-(-side // divisor) * divisor for side in INPUT_SIZE))
        return _measure(encoder, lambda: encoder(image, return_feature_maps=True))


def build_decoder(name: str, encoder: Part, num_class: int = 150) -> Part:
    encoder, features, _ = encoder
    options = {"in_channels": encoder.out_channels, "output_stride": encoder.output_stride}
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder(name, num_class=num_class, **options).eval()
        return _measure(decoder, lambda: decoder.head(features))


def _size_and_cost(*parts: Part) -> tuple[str, str]:
    parameters = sum(p.numel() for part in parts for p in part.module.parameters()) / 1e6
    return f"{parameters:.2f}", f"{sum(part.gflops for part in parts):.1f}"


def _encoder_row(name: str) -> tuple:
    part = build_encoder(name)
    channels = ", ".join(map(str, part.module.out_channels))
    return f"`{name}`", *_size_and_cost(part), channels, part.module.output_stride


def models_page() -> str:
    """Return the tables of encoders, decoders and configurations."""
    encoders, timm, decoders, configs = [], [], [], []
    for name in ENCODERS:
        encoders.append((*_encoder_row(name), "yes" if imagenet_sources(name) else "no"))
    for name in TIMM_EXAMPLES:
        timm.append(_encoder_row(f"timm:{name}"))
    for name in DECODERS:
        decoders.append((f"`{name}`", *_size_and_cost(build_decoder(name, build_encoder("resnet50dilated")))))
    for path in sorted(CONFIGS.glob("*.yaml")):
        cfg = load_config(path)
        encoder = build_encoder(cfg.MODEL.arch_encoder, cfg.MODEL.output_stride or None)
        cost = _size_and_cost(encoder, build_decoder(cfg.MODEL.arch_decoder, encoder, cfg.DATASET.num_class))
        configs.append((f"`{path.stem}`", *cost, published_metrics(path.read_text(encoding="utf-8"))))
    return MODELS_PAGE.format(
        encoders=_table("Encoder, Parameters, GFLOPs, Channels, Output stride, ImageNet weights", encoders),
        timm=_table("Encoder, Parameters, GFLOPs, Channels, Output stride", timm),
        decoders=_table("Decoder, Parameters, GFLOPs", decoders),
        configs=_table("Config, Parameters, GFLOPs, Published metrics", configs),
    )


def published_metrics(config: str) -> str:
    """Return the published metrics in the comments of a configuration file, or '-'."""
    comments = " ".join(line.lstrip("# ") for line in config.splitlines() if line.startswith("#"))
    return "; ".join(METRICS.findall(" ".join(comments.split()))) or "-"


def options_page() -> str:
    """Return one table of options per section."""
    sections: dict[str, list[tuple]] = {}
    for key, option in OPTIONS.items():
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default) or "''"
        row = f"`{key}`", f"`{default}`", allowed_values(key, option), option.help.replace("|", "\\|")
        sections.setdefault(key.rpartition(".")[0] or "Run", []).append(row)
    columns = "Option, Default, Allowed values, Meaning"
    tables = (f"## {section}\n\n{_table(columns, rows)}" for section, rows in sections.items())
    return OPTIONS_PAGE.format(tables="\n\n".join(tables))


def allowed_values(key: str, option: Option) -> str:
    """Describe the allowed values of an option in Markdown."""
    if key == "MODEL.arch_encoder":
        return ", ".join(f"`{choice}`" for choice in (*ENCODERS, "timm:NAME"))
    if key == "TRAIN.class_weights":
        return "`auto`, or list of numbers, at least 0"
    if choices := CHOICES.get(key) or option.choices or ((True, False) if type(option.default) is bool else ()):
        return ", ".join(f"`{choice}`" for choice in choices)
    items = "names" if str in option.types else "numbers" if option.fractions else "integers"
    kinds = [KINDS[kind] for kind in option.types if kind is not tuple]
    text = " or ".join(kinds + [f"list of {items}"] * (tuple in option.types))
    if math.isinf(option.high):
        return text if math.isinf(option.low) else f"{text}, at least {option.low:g}"
    return f"{text}, {option.low:g} to {option.high:g}"


def _table(columns: str, rows: Iterable[Sequence]) -> str:
    head = columns.split(", ")
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


PAGES = {"models.md": models_page, "options.md": options_page}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
