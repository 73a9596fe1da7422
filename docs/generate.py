"""Pages of the documentation that the code knows best, in Markdown.

    python docs/generate.py docs/models.md     # encoders, decoders and recipes: size, cost, published score
    python docs/generate.py docs/options.md    # every option with its default and meaning

The networks are built without memory (on PyTorch's meta device), so this takes seconds.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mit_semseg.config import load_config
from mit_semseg.config.defaults import OPTIONS, Option
from mit_semseg.lib.utils import atomic_write
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.models.pretrained import has_imagenet_weights

CONFIGS = Path(__file__).resolve().parents[1] / "config"
SIZE = (512, 688)  # a 512x683 picture as it reaches the network: sides are rounded up to multiples of 8
REFERENCE = "resnet50dilated"  # the encoder under the decoders' figures
HEAD = """\
# Models

Any encoder goes with any decoder. This page is made by `python docs/generate.py docs/models.md`.

Parameters are millions, with the heads that only training uses. GFLOPs are 10⁹ floating point operations (an addition
or a multiplication each) of convolutions and matrix products, for one 512x683 picture in inference, padded to 512x688.
"""
OPTIONS_HEAD = """\
# Options

Every key of a YAML file and of the end of a command line (`TRAIN.num_epoch 10`). This page is made by
`python docs/generate.py docs/options.md`.
"""


@dataclass(frozen=True)
class _Counted:
    """A part of a network, what it gives for a picture of `SIZE`, and the GFLOPs of that."""

    part: nn.Module
    output: object
    cost: float

    @classmethod
    def of(cls, part: nn.Module, call: Callable, *arguments, **options) -> "_Counted":
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = call(*arguments, **options)
        return cls(part, output, counter.get_total_flops() / 1e9)


@cache
def _encoder(name: str) -> _Counted:
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(name, pretrained=False).eval()
        return _Counted.of(encoder, encoder, torch.empty(1, 3, *SIZE), return_feature_maps=True)


@cache
def _decoder(name: str, encoder_name: str, num_class: int = 150) -> _Counted:
    below = _encoder(encoder_name)
    with torch.device("meta"):
        options = {"in_channels": below.part.out_channels, "output_stride": below.part.output_stride}
        decoder = ModelBuilder.build_decoder(name, num_class=num_class, **options).eval()
        return _Counted.of(decoder, decoder.head, below.output)


def _millions(*modules: nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def models_page() -> str:
    """The page of models."""
    return "\n".join([HEAD, *_encoders(), *_decoders(), *_recipes()])


def options_page() -> str:
    """The page of options, a table per section."""
    lines = [OPTIONS_HEAD]
    sections: dict[str, list[tuple]] = {}
    for key, option in OPTIONS.items():
        default = "''" if option.default == "" else str(option.default)
        row = f"`{key}`", f"`{default}`", _allowed(option), option.help.replace("|", "\\|")
        sections.setdefault(key.rpartition(".")[0] or "The run", []).append(row)
    for name, rows in sections.items():
        lines += [f"## {name}\n", *_table(("Option", "Default", "Allowed", "Meaning"), rows), ""]
    return "\n".join(lines).rstrip()


def _allowed(option: Option) -> str:
    """Choices or bounds of an option."""
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    if math.isinf(option.low):
        return ""
    return f"from {option.low:g}" if math.isinf(option.high) else f"{option.low:g} to {option.high:g}"


PAGES = {"models": models_page, "options": options_page}


def _encoders() -> Iterator[str]:
    yield "## Encoders\n"
    rows = []
    for name in ENCODERS:
        counted = _encoder(name)
        encoder = counted.part
        channels = ", ".join(map(str, encoder.out_channels))
        base = "yes" if has_imagenet_weights(name) else "no"
        rows.append(
            (f"`{name}`", f"{_millions(encoder):.2f}", f"{counted.cost:.1f}", channels, encoder.output_stride, base)
        )
    yield from _table(("Encoder", "parameters", "GFLOPs", "channels", "output stride", "ImageNet base known"), rows)


def _decoders() -> Iterator[str]:
    yield f"\n## Decoders\n\nOn top of `{REFERENCE}`, 150 classes.\n"
    rows = []
    for name in DECODERS:
        decoder = _decoder(name, REFERENCE)
        rows.append((f"`{name}`", f"{_millions(decoder.part):.2f}", f"{decoder.cost:.1f}"))
    yield from _table(("Decoder", "parameters", "GFLOPs"), rows)


def _recipes() -> Iterator[str]:
    yield (
        "\n## Recipes\n\nScores that the authors of the published models report, in %: mean IoU / pixel accuracy / "
        "their mean, or\nwhat there is of them. They are not measured by this repository.\n"
    )
    rows = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        cfg = load_config(path)
        encoder = _encoder(cfg.MODEL.arch_encoder)
        decoder = _decoder(cfg.MODEL.arch_decoder, cfg.MODEL.arch_encoder, cfg.DATASET.num_class)
        size, cost = _millions(encoder.part, decoder.part), encoder.cost + decoder.cost
        rows.append((f"`{path.stem}`", f"{size:.2f}", f"{cost:.1f}", published_score(path.read_text(encoding="utf-8"))))
    yield from _table(("Config", "parameters", "GFLOPs", "published"), rows)


def published_score(recipe: str) -> str:
    """The score that the comments at the head of a recipe name, or a dash."""
    comments = " ".join(line.lstrip("# ") for line in recipe.splitlines() if line.startswith("#"))
    pattern = r"(single scale|multi-scale) +(\d\d\.\d\d / \d\d\.\d\d / \d\d\.\d\d(?: \([^)]*\))?)"
    if pairs := re.findall(pattern, comments):
        return "; ".join(f"{how} {score}" for how, score in pairs)
    single = re.search(r"validation images: (\d\d\.\d\d / \d\d\.\d\d)|published: mean IoU (\d\d\.\d)", comments)
    return next(group for group in single.groups() if group) if single else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(map(str, row))} |"


def main() -> None:
    """Write a page."""
    parser = argparse.ArgumentParser("python docs/generate.py", description="Write a page of the documentation.")
    parser.add_argument(
        "path", metavar="FILE", type=Path, help=f"of the page: {' or '.join(f'{name}.md' for name in PAGES)}"
    )
    path = parser.parse_args().path
    if path.stem not in PAGES:
        parser.error(f"there is no page {path.stem}, but {', '.join(PAGES)}")
    with atomic_write(path) as partial:
        partial.write_text(PAGES[path.stem]() + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
