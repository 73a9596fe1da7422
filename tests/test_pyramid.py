"""Convolution over a pyramid of feature maps without resizing, and average pooling by matrix products."""

import math

import pytest
import torch
import torch.nn.functional as F
from near import assert_near
from torch import nn

from mit_semseg.models import pyramid
from mit_semseg.models.layers import POOL_SCALES, average_pool
from mit_semseg.models.pyramid import conv_over_pyramid, conv_over_resized


def inputs(height, width, kernel=3, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, 5, height, width, dtype=dtype, requires_grad=True)
    pooled = [torch.randn(2, 3, bins, bins, dtype=dtype, requires_grad=True) for bins in POOL_SCALES]
    conv = nn.Conv2d(5 + 3 * len(POOL_SCALES), 4, kernel, padding=kernel // 2).to(dtype)
    return conv, x, pooled


def output_and_gradients(function, conv, x, pooled, **options):
    y = function(conv, x, pooled, **options)
    factor = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y * factor).sum(), [x, *pooled, *conv.parameters()])]


@pytest.mark.parametrize("smaller_first", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("min_saving", [0, pyramid.MIN_SAVING, math.inf], ids=["no map resized", "some", "all"])
@pytest.mark.parametrize(("height", "width", "kernel"), [(4, 5, 3), (21, 34, 3), (9, 30, 1), (12, 11, 5)])
def test_outputs_and_gradients(height, width, kernel, align_corners, smaller_first, min_saving, monkeypatch):
    monkeypatch.setattr(pyramid, "MIN_SAVING", min_saving)
    options = {"align_corners": align_corners, "smaller_first": smaller_first}
    arguments = inputs(height, width, kernel)
    actual = output_and_gradients(conv_over_pyramid, *arguments, **options)
    expected = output_and_gradients(conv_over_resized, *arguments, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(layout):
    conv, x, pooled = inputs(20, 30, dtype=torch.float32)
    conv, x = conv.to(memory_format=layout), x.contiguous(memory_format=layout)
    y = conv_over_pyramid(conv, x, pooled)
    assert y.is_contiguous(memory_format=layout)
    assert_near(y, conv_over_resized(conv, x, pooled))


def test_matrix_cached_in_inference_mode_works_in_training():
    conv, x, pooled = inputs(17, 19)
    with torch.inference_mode():
        conv_over_pyramid(conv, x, pooled)
    conv_over_pyramid(conv, x, pooled).sum().backward()
    assert conv.weight.grad is not None


def test_module_works_after_its_export():
    """The tensors that `torch.export` creates have no values, so they are not cached."""

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x):
            return conv_over_pyramid(self.conv, x, [average_pool(x, 2)])

    module, x = Pyramid().eval(), torch.randn(1, 4, 23, 29)
    program = torch.export.export(module, (x,), strict=False)
    torch.testing.assert_close(module(x), program.module()(x))
    assert type(module(x)) is torch.Tensor


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bins", POOL_SCALES)
@pytest.mark.parametrize("size", [(4, 5), (6, 6), (13, 31)])
def test_average_pool_equals_pytorch(size, bins, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    ours, theirs = average_pool(x, bins), F.adaptive_avg_pool2d(x, bins)
    torch.testing.assert_close(ours, theirs)
    factor = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((y * factor).sum(), x)[0] for y in (ours, theirs)))
