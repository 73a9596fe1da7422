"""Fusion of batch norms into convolutions."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mit_semseg.models import DECODERS, ModelBuilder
from mit_semseg.models.fuse_bn import fuse_batchnorm
from mit_semseg.models.layers import NORMS


def randomize_norms(module):
    """Set random statistics and parameters of batch norms; return the module in float64 and eval mode."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    return module.double().eval()


def check_fusion(module, call, remaining_norms=0):
    fused = fuse_batchnorm(module.train())
    assert module.training
    assert not fused.training
    module.eval()
    with torch.no_grad():
        actual, expected = call(fused), call(module)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())
    assert sum(isinstance(layer, _BatchNorm) for layer in fused.modules()) == remaining_norms


@pytest.mark.parametrize("norm", ["sync", "inplace"])
@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18dilated", "resnet50_v1", "hrnetv2"])
def test_fused_encoder_is_equivalent(name, norm):
    """In-place batch norms are not fused."""
    encoder = randomize_norms(ModelBuilder.build_encoder(name, pretrained=False, norm_layer=NORMS[norm]))
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    norms = sum(isinstance(layer, _BatchNorm) for layer in encoder.modules())
    check_fusion(encoder, lambda module: module(x, return_feature_maps=True), norms if norm == "inplace" else 0)


@pytest.mark.parametrize("name", DECODERS)
def test_fused_decoder_is_equivalent(name):
    decoder = randomize_norms(ModelBuilder.build_decoder(name, num_class=4, in_channels=(8, 12, 16)))
    features = [torch.randn(1, c, 12, 16, dtype=torch.float64) for c in (8, 12, 16)]
    check_fusion(decoder, lambda module: module.logits(features))
