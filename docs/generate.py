"""Generate docs/models.md and docs/options.md from the code.

    python docs/generate.py

Networks are built on PyTorch's meta device, which allocates no memory; this takes about half a minute.
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
from mit_semseg.models.pretrained import has_imagenet_weights

DOCS = Path(__file__).resolve().parent
CONFIGS = DOCS.parent / "config"
INPUT_SIZE = (512, 688)  # a 512x683 image, padded to a multiple of 8
CHOICES = {  # of options whose values are names in a table of the package
    "MODEL.arch_encoder": ENCODERS,
    "MODEL.arch_decoder": DECODERS,
    "TRAIN.optim": OPTIMIZERS,
    "TRAIN.loss": LOSSES,
}
# "single scale 41.26 / 79.73 / 60.50 (remark)", "32.77 / 76.47" or "mean IoU 78.3"
SCORES = re.compile(
    r"(?:single scale |multi-scale )?\d\d\.\d\d(?: / \d\d\.\d\d)+(?: \([^)]*\))?|(?<=mean IoU )\d\d\.\d"
)
KINDS = {int: "integer", float: "number", str: "path"}

MODELS_PAGE = """\
# Models

Set `MODEL.arch_encoder` and `MODEL.arch_decoder`. Every encoder works with every decoder.

- Parameters: in millions, with the layers that only training uses (deep supervision).
- GFLOPs: 10⁹ floating point operations of convolutions and matrix products for one image of 512x683 pixels, padded to
  512x688. A multiplication and an addition count as two operations.

`python docs/generate.py` writes this page.

## Encoders

{encoders}

## Decoders

With the encoder `resnet50dilated` and 150 classes.

{decoders}

## Configurations

The authors of the published models report these scores, in %: mean IoU / pixel accuracy / mean of both. A single number
is the mean IoU. The scores were not measured with this repository.

{configs}
"""
OPTIONS_PAGE = """\
# Options

Set an option in a YAML file, or at the end of a command line: `python train.py --cfg FILE TRAIN.num_epoch 10`. Write
lists as `"(300, 375)"` on a command line and as `[300, 375]` in YAML.

`python docs/generate.py` writes this page.
"""


class Part(NamedTuple):
    """An encoder or decoder, its output for an image of `INPUT_SIZE`, and the cost of computing it."""

    module: nn.Module
    output: object
    gflops: float


def _measure(module: nn.Module, call: Callable[[], object]) -> Part:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = call()
    return Part(module, output, counter.get_total_flops() / 1e9)


@cache
def build_encoder(name: str) -> Part:
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(name, pretrained=False).eval()
        return _measure(encoder, lambda: encoder(torch.empty(1, 3, *INPUT_SIZE), return_feature_maps=True))


def build_decoder(name: str, encoder_name: str, num_class: int = 150) -> Part:
    encoder, features, _ = build_encoder(encoder_name)
    options = {"in_channels": encoder.out_channels, "output_stride": encoder.output_stride}
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder(name, num_class=num_class, **options).eval()
        return _measure(decoder, lambda: decoder.head(features))


def _size_and_cost(*parts: Part) -> tuple[str, str]:
    parameters = sum(p.numel() for part in parts for p in part.module.parameters()) / 1e6
    return f"{parameters:.2f}", f"{sum(part.gflops for part in parts):.1f}"


def models_page() -> str:
    """Return the tables of encoders, decoders and configurations."""
    encoders, decoders, configs = [], [], []
    for name in ENCODERS:
        part = build_encoder(name)
        channels = ", ".join(map(str, part.module.out_channels))
        imagenet = "yes" if has_imagenet_weights(name) else "no"
        encoders.append((f"`{name}`", *_size_and_cost(part), channels, part.module.output_stride, imagenet))
    for name in DECODERS:
        decoders.append((f"`{name}`", *_size_and_cost(build_decoder(name, "resnet50dilated"))))
    for path in sorted(CONFIGS.glob("*.yaml")):
        cfg = load_config(path)
        encoder, decoder = cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder
        cost = _size_and_cost(build_encoder(encoder), build_decoder(decoder, encoder, cfg.DATASET.num_class))
        configs.append((f"`{path.stem}`", *cost, published_scores(path.read_text(encoding="utf-8"))))
    return MODELS_PAGE.format(
        encoders=_table("Encoder, Parameters, GFLOPs, Channels, Output stride, ImageNet weights", encoders),
        decoders=_table("Decoder, Parameters, GFLOPs", decoders),
        configs=_table("Config, Parameters, GFLOPs, Published scores", configs),
    )


def published_scores(config: str) -> str:
    """Return the published scores in the comments of a configuration file, '-' if there are none."""
    comments = " ".join(line.lstrip("# ") for line in config.splitlines() if line.startswith("#"))
    return "; ".join(SCORES.findall(" ".join(comments.split()))) or "-"


def options_page() -> str:
    """Return one table of options per section."""
    sections: dict[str, list[tuple]] = {}
    for key, option in OPTIONS.items():
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default) or "''"
        row = f"`{key}`", f"`{default}`", allowed_values(key, option), option.help.replace("|", "\\|")
        sections.setdefault(key.rpartition(".")[0] or "Run", []).append(row)
    columns = "Option, Default, Allowed values, Meaning"
    tables = (f"## {section}\n\n{_table(columns, rows)}\n" for section, rows in sections.items())
    return "\n".join([OPTIONS_PAGE, *tables])


def allowed_values(key: str, option: Option) -> str:
    """Describe the allowed values of an option in Markdown."""
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
