"""The folded convolution over a pyramid is the plain one: values, gradients, in every mode it is used in."""

import pytest
import torch
from torch import nn

from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import POOL_SCALES
from mit_semseg.models.pyramid import FEWEST_PIXELS, conv_over_pyramid, conv_over_resized


def inputs(height, width, kernel=3, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    x = torch.randn(2, 5, height, width, dtype=dtype, requires_grad=True)
    pooled = [torch.randn(2, 3, bins, bins, dtype=dtype, requires_grad=True) for bins in POOL_SCALES]
    conv = nn.Conv2d(5 + 3 * len(POOL_SCALES), 4, kernel, padding=kernel // 2, bias=bias).to(dtype)
    return conv, x, pooled


def results(function, conv, x, pooled, **options):
    y = function(conv, x, pooled, **options)
    factor = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y * factor).sum(), [x, *pooled, *conv.parameters()])]


@pytest.mark.parametrize("pooled_first", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("height", "width", "kernel"), [(8, 8, 3), (13, 7, 3), (21, 34, 3), (9, 30, 1), (12, 11, 5)])
def test_values_and_gradients(height, width, kernel, align_corners, pooled_first):
    options = {"align_corners": align_corners, "pooled_first": pooled_first}
    given = inputs(height, width, kernel)
    for folded, plain in zip(
        results(conv_over_pyramid, *given, **options), results(conv_over_resized, *given, **options), strict=True
    ):
        torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-12)


def test_float32_is_as_near_as_rounding():
    given = inputs(40, 56, dtype=torch.float32)
    exact = conv_over_resized(given[0].double(), given[1].double(), [t.double() for t in given[2]])
    folded = conv_over_pyramid(given[0].float(), given[1], given[2])
    assert (folded - exact).abs().max() / exact.abs().max() < 2e-6


def test_small_maps_take_the_plain_way():
    conv, x, pooled = inputs(4, 5)
    assert x.size(-1) * x.size(-2) < FEWEST_PIXELS
    assert torch.equal(conv_over_pyramid(conv, x, pooled), conv_over_resized(conv, x, pooled))


def test_a_matrix_of_inference_serves_training():
    conv, x, pooled = inputs(17, 19)
    with torch.inference_mode():
        conv_over_pyramid(conv, x, pooled)
    conv_over_pyramid(conv, x, pooled).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("name", ["ppm_deepsup", "psp_bilinear", "psp_deepsup"])
def test_decoders_in_channels_last_and_autocast(name):
    decoder = ModelBuilder.build_decoder(name, num_class=5, in_channels=(8, 16)).eval()
    features = [torch.randn(2, c, 12, 16) for c in (8, 16)]
    expected = decoder.head(features)
    last = decoder.to(memory_format=torch.channels_last).head(
        [x.contiguous(memory_format=torch.channels_last) for x in features]
    )
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = decoder.head(features)
    assert (low.float() - expected).norm() < 0.05 * expected.norm()
