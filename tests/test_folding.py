"""The folded network is the network, for every encoder and decoder."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.fuse_bn import fuse_batchnorm
from mit_semseg.models.layers import NORMS


def lively(module):
    """Running estimates and scales as training leaves them, not those of a new network."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
    return module.double().eval()


def check(module, call, unfolded=0):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    copied = fuse_batchnorm(module)
    with torch.no_grad():
        ours, theirs = call(copied), call(module)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())
    assert sum(isinstance(part, _BatchNorm) for part in copied.modules()) == unfolded
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18dilated", "resnet50_v1", "hrnetv2"])
def test_encoders(name):
    encoder = lively(ModelBuilder.build_encoder(name, pretrained=False))
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    check(encoder, lambda module: module(x, return_feature_maps=True))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    decoder = lively(ModelBuilder.build_decoder(name, num_class=4, in_channels=(8, 12, 16)))
    features = [torch.randn(1, c, 12, 16, dtype=torch.float64) for c in (8, 12, 16)]
    check(decoder, lambda module: module.logits(features))


def test_a_network_in_training_stays_in_training():
    encoder = ModelBuilder.build_encoder("resnet18", pretrained=False).train()
    module = SegmentationModule(encoder, ModelBuilder.build_decoder("c1", fc_dim=512, num_class=2), None).train()
    copied = fuse_batchnorm(module)
    assert not copied.training
    assert all(part.training for part in module.modules())
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_in_place_norms_stay():
    encoder = lively(ModelBuilder.build_encoder("resnet18", pretrained=False, norm_layer=NORMS["inplace"]))
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    count = sum(isinstance(part, _BatchNorm) for part in encoder.modules())
    check(encoder, lambda module: module(x, return_feature_maps=True), unfolded=count)
