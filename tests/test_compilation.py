"""Blocks of equal structure are compiled once, for all image sizes, and give the same outputs and gradients."""

import copy

import pytest
import torch

from mit_semseg.lib.nn import compile_blocks
from mit_semseg.models import ModelBuilder
from mit_semseg.models.encoders.resnet import BasicBlock, make_layer
from mit_semseg.models.layers import DEFAULT_NORM


def outputs_and_gradients(block, device, height, width):
    x = torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(device, memory_format=torch.channels_last).requires_grad_()
    y = block(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])


def assert_no_recompilation(device):
    """Compile one of two blocks for one image size; check that both blocks then work for any image size."""
    eager = make_layer(BasicBlock, 8, 8, 2, norm_layer=DEFAULT_NORM)
    eager.to(device, torch.float64, memory_format=torch.channels_last)
    compiled = copy.deepcopy(eager)
    assert compile_blocks(compiled) == 2
    outputs_and_gradients(compiled[0], device, 12, 16)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number, height, width in ((0, 12, 16), (1, 12, 16), (0, 20, 14), (1, 9, 33)):
            results = (outputs_and_gradients(module[number], device, height, width) for module in (compiled, eager))
            for ours, expected in zip(*results, strict=True):
                torch.testing.assert_close(ours, expected)


@pytest.mark.long
def test_blocks_share_a_compilation_for_all_sizes():
    assert_no_recompilation(torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50dilated", 16),
        ("mobilenetv2dilated", 17),
        ("hrnetv2", 4 + 2 * 4 + 4 * 12 + 3 * 16),
        ("vgg16_dilated8", 1),
    ],
)
def test_number_of_compiled_blocks(name, count, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(name, pretrained=False)
    assert compile_blocks(encoder) == len(compiled) == count
