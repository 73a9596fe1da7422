"""docs/models.md and docs/options.md equal the output of docs/generate.py."""

import pytest
import torch
from generate import DOCS, INPUT_SIZE, PAGES, build_encoder

from mit_semseg.models import ModelBuilder


@pytest.mark.parametrize("name", ["options.md", pytest.param("models.md", marks=pytest.mark.long)])
def test_page_is_up_to_date(name):
    assert PAGES[name]() == (DOCS / name).read_text(), f"docs/{name} is out of date; run python docs/generate.py"


def test_gflops_of_an_encoder_are_those_of_its_convolutions():
    """A k x k convolution performs 2 k² C_in C_out H W operations."""
    counts = []

    def count(conv, _, output):
        counts.append(2 * conv.weight.numel() * output.shape[-2] * output.shape[-1])

    encoder = ModelBuilder.build_encoder("resnet18", pretrained=False).eval()
    for part in encoder.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(count)
    with torch.no_grad():
        encoder(torch.zeros(1, 3, *INPUT_SIZE))
    assert build_encoder("resnet18").gflops == pytest.approx(sum(counts) / 1e9, rel=1e-6)
