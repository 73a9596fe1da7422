"""The generated pages are what their command writes, and know every model, recipe and option."""

from pathlib import Path

import pytest
import torch
from generate import PAGES, published_score

from mit_semseg.config.defaults import OPTIONS
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name):
    assert PAGES[name]() + "\n" == (ROOT / "docs" / f"{name}.md").read_text()


def test_every_option_is_there():
    text = (ROOT / "docs" / "options.md").read_text()
    assert all(f"| `{key}` | " in text for key in OPTIONS)


def test_every_name_and_recipe_is_there():
    text = PAGE.read_text()
    for name in (*ENCODERS, *DECODERS, *(path.stem for path in (ROOT / "config").glob("*.yaml"))):
        assert f"| `{name}` |" in text


def test_operations_are_counted_right():
    """An encoder small enough to count by hand: every convolution does 2 k² Cin Cout H W operations."""
    from generate import SIZE, _encoder

    encoder = ModelBuilder.build_encoder("resnet18", pretrained=False).eval()
    counted = 0

    def count(conv, _, output):
        nonlocal counted
        counted += 2 * conv.weight.numel() * output.shape[-2] * output.shape[-1]

    for part in encoder.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(count)
    with torch.no_grad():
        encoder(torch.zeros(1, 3, *SIZE))
    assert _encoder("resnet18").cost == pytest.approx(counted / 1e9, rel=1e-6)


def test_scores_come_from_the_heads_of_the_recipes():
    assert published_score("# Published: ...\n#   single scale 42.03 / 80.77 / 61.40\n") == (
        "single scale 42.03 / 80.77 / 61.40"
    )
    assert published_score("# python train.py\nDIR: x\n") == "-"
