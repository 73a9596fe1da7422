"""The folded convolution over a pyramid is the plain one: values, gradients, in every mode it is used in."""

import math

import pytest
import torch
import torch.nn.functional as F
from near import assert_near
from torch import nn

from mit_semseg.models import ModelBuilder, pyramid
from mit_semseg.models.layers import POOL_SCALES, average_pool
from mit_semseg.models.pyramid import conv_over_pyramid, conv_over_resized


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


@pytest.mark.parametrize("smaller_first", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("gain", [0, pyramid.GAIN, math.inf])
@pytest.mark.parametrize(("height", "width", "kernel"), [(4, 5, 3), (13, 7, 3), (21, 34, 3), (9, 30, 1), (12, 11, 5)])
def test_values_and_gradients(height, width, kernel, align_corners, smaller_first, gain, monkeypatch):
    """All maps without resizing, those for which it pays, none."""
    monkeypatch.setattr(pyramid, "GAIN", gain)
    options = {"align_corners": align_corners, "smaller_first": smaller_first}
    given = inputs(height, width, kernel)
    for folded, plain in zip(
        results(conv_over_pyramid, *given, **options), results(conv_over_resized, *given, **options), strict=True
    ):
        torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-12)


def test_float32_is_as_near_as_rounding():
    given = inputs(40, 56, dtype=torch.float32)
    exact = conv_over_resized(given[0].double(), given[1].double(), [t.double() for t in given[2]])
    folded = conv_over_pyramid(given[0].float(), given[1], given[2])
    assert_near(folded, exact, 1e-5)


def test_maps_that_are_not_much_smaller_are_resized():
    conv, x, pooled = inputs(4, 5)
    assert pyramid._gain(pooled[-1], x.shape[-2:], (3, 3)) < pyramid.GAIN < pyramid._gain(pooled[0], (9, 9), (3, 3))
    torch.testing.assert_close(conv_over_pyramid(conv, x, pooled), conv_over_resized(conv, x, pooled))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_order_is_kept(layout):
    conv, x, pooled = inputs(20, 30, dtype=torch.float32)
    conv, x = conv.to(memory_format=layout), x.contiguous(memory_format=layout)
    y = conv_over_pyramid(conv, x, pooled)
    assert y.is_contiguous(memory_format=layout)
    assert_near(y, conv_over_resized(conv, x, pooled))


def test_a_matrix_of_inference_serves_training():
    conv, x, pooled = inputs(17, 19)
    with torch.inference_mode():
        conv_over_pyramid(conv, x, pooled)
    conv_over_pyramid(conv, x, pooled).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("name", ["ppm_deepsup", "psp_bilinear", "psp_deepsup", "upernet"])
def test_decoders_in_channels_last_and_autocast(name):
    decoder = ModelBuilder.build_decoder(name, num_class=5, in_channels=(8, 16)).eval()
    features = [torch.randn(2, c, 24 // stride, 32 // stride) for c, stride in ((8, 1), (16, 2))]
    expected = decoder.head(features)
    last = decoder.to(memory_format=torch.channels_last).head(
        [x.contiguous(memory_format=torch.channels_last) for x in features]
    )
    assert_near(last, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = decoder.head(features)
    assert (low.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bins", POOL_SCALES)
@pytest.mark.parametrize("size", [(4, 5), (6, 6), (13, 31)])
def test_pooling_is_pytorchs(size, bins, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    ours, theirs = average_pool(x, bins), F.adaptive_avg_pool2d(x, bins)
    torch.testing.assert_close(ours, theirs)
    factor = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((y * factor).sum(), x)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("stride", [4, 8])
def test_hrnet_is_not_concatenated_for_a_convolution(stride):
    """C1 over HRNetV2 gives what it gives over the feature map itself, which is then never made."""
    encoder = ModelBuilder.build_encoder("hrnetv2", pretrained=False, output_stride=stride).double().eval()
    decoder = ModelBuilder.build_decoder("c1_deepsup", num_class=5, in_channels=encoder.out_channels).double().eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96).double()
        features = encoder(x, return_feature_maps=True, lazily=True)
        ours = decoder.logits(features)
        assert (features._whole is None) == (stride == 4)
        plain = decoder.logits([features[0]])
        (whole,) = encoder(x, return_feature_maps=True)
    assert torch.equal(whole, features[0])
    assert features[0].shape == (1, 720, 64 // stride, 96 // stride)
    assert list(features) == [features[-1]]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
