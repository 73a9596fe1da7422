"""Depthwise convolutions with dilation, and with the padding of TensorFlow."""

import pytest
import torch
import torch.nn.functional as F

from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import DilatedDepthwiseConv2d, SameConv2d, conv2d, dilated_depthwise


@pytest.mark.parametrize("size", [(12, 8), (7, 9), (1, 1), (3, 5)])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 2), (3, 4), (5, 2), (5, 3)])
def test_dilated_convolution_and_gradients_equal_pytorch(kernel_size, dilation, size):
    conv = conv2d(6, 6, kernel_size, dilation=dilation, groups=6, bias=True).double()
    assert type(conv) is DilatedDepthwiseConv2d
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = x, conv.weight, conv.bias
    y, expected = conv(x), F.conv2d(*inputs, 1, dilation * (kernel_size // 2), dilation, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    factor = torch.randn_like(y)
    for actual, gradient in zip(*(torch.autograd.grad(z, inputs, factor) for z in (y, expected)), strict=True):
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("inference", [True, False])
def test_only_training_with_channels_last_splits_images(inference, monkeypatch):
    calls = []
    original = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: calls.append(len(x)) or original(x, *args))
    x, weight = torch.randn(2, 6, 8, 8), torch.randn(6, 1, 3, 3, requires_grad=True)
    dilated_depthwise(x, weight, None, 2)
    with torch.set_grad_enabled(not inference):
        dilated_depthwise(x.contiguous(memory_format=torch.channels_last), weight, None, 2)
    assert calls == [2, 2 if inference else 8]


def test_encoders_use_it():
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder("mobilenetv2dilated", pretrained=False)
    assert sum(isinstance(layer, DilatedDepthwiseConv2d) for layer in encoder.modules()) == 10


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (9, 5)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_same_padding_is_that_of_tensorflow(kernel_size, size):
    """TensorFlow pads to the size that the last window needs, with the smaller half at the start."""
    conv = conv2d(3, 4, kernel_size, stride=2, same_padding=True)
    assert type(conv) is SameConv2d
    x = torch.randn(1, 3, *size)
    total = [max(0, (-(-side // 2) - 1) * 2 + kernel_size - side) for side in size]
    height, width = [(n // 2, n - n // 2) for n in total]
    assert torch.equal(conv(x), F.conv2d(F.pad(x, (*width, *height)), conv.weight, None, 2))
