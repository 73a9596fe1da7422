"""Models of version 1.0: keys and outputs equal those of the published models."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import empty, fill, golden, golden_input, sample
from test_models_golden import own_keys, published_keys

from mit_semseg.models import ModelBuilder

MODELS, KEYS = golden("golden_v1"), golden("state_dict_keys_v1")
DTYPES = ((torch.float32, 1e-4), (torch.float64, 1e-8))


def encoder_of(name):
    old = {"resnet34": "resnet34_v1", "resnet50": "resnet50_v1"}
    return empty(ModelBuilder.build_encoder, old.get(name, name), pretrained=False)


@cache
def features_of(name):
    """Return keys and number of parameters of an encoder, and its feature maps in float32 and float64."""
    encoder = fill(encoder_of(name), MODELS["encoders"][name]["gains"][0]).eval()
    with torch.no_grad():
        maps = [encoder.to(d)(golden_input(72, 104).to(d), return_feature_maps=True) for d, _ in DTYPES]
    return own_keys(encoder), sum(p.numel() for p in encoder.parameters()), maps


def vgg_is_long(names):
    return [pytest.param(name, marks=[pytest.mark.long] * ("vgg" in name)) for name in names]


@pytest.mark.parametrize("name", vgg_is_long(MODELS["encoders"]))
def test_keys_and_features_of_encoder(name):
    gold = MODELS["encoders"][name]
    keys, count, maps = features_of(name)
    assert keys == published_keys(KEYS["encoders"][name])
    assert count == gold["params"]
    expected = gold["features"]["soft"]
    for (_, relative), (*_, last) in zip(DTYPES, maps, strict=True):
        assert list(last.shape) == expected["shape"]
        np.testing.assert_allclose(sample(last, 32), expected["values"], rtol=0, atol=relative * expected["absmax"])


@pytest.mark.parametrize("name", KEYS["decoders"])
def test_keys_of_decoder(name):
    arch, dim = name.split("/fc")
    decoder = empty(ModelBuilder.build_decoder, arch, fc_dim=int(dim))
    assert own_keys(decoder) == published_keys(KEYS["decoders"][name])
    assert sum(p.numel() for p in decoder.parameters()) == MODELS["decoders"][name]["params"]


@pytest.mark.parametrize("name", vgg_is_long(MODELS["pairs"]))
def test_outputs_of_pair(name):
    """With aligned corners, as published, and without."""
    pair, (encoder_name, decoder_name) = MODELS["pairs"][name], name.split("+")
    gain = MODELS["encoders"][encoder_name]["gains"][1]
    decoder = fill(empty(ModelBuilder.build_decoder, decoder_name, fc_dim=pair["fc_dim"]), gain).eval()
    assert decoder.align_corners
    for (dtype, _), maps in zip(DTYPES, features_of(encoder_name)[2], strict=True):
        for aligned in (True, False):
            decoder.align_corners = aligned
            with torch.no_grad():
                softmax = decoder.to(dtype)(maps, segSize=(72, 104))
                log_softmax = F.log_softmax(decoder.resize(decoder.logits(maps)[0], (72, 104)), dim=1)
            for tensor, kind in ((softmax, "softmax"), (log_softmax, "log_softmax")):
                gold = pair["soft"][f"{kind}_ac_{str(aligned).lower()}"]
                atol = (1e-8 if dtype == torch.float64 else 1e-4) * gold["absmax"]
                np.testing.assert_allclose(sample(tensor, 64), gold["values"], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_version_1_is_recognized_by_its_weights(name, tmp_path):
    path = tmp_path / "encoder.pth"
    old = ModelBuilder.build_encoder(f"{name}_v1", pretrained=False)
    torch.save(old.state_dict(), path)
    loaded = ModelBuilder.build_encoder(name, weights=str(path))
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in loaded.state_dict().items())
    torch.save(ModelBuilder.build_encoder(name, pretrained=False).state_dict(), path)
    assert ModelBuilder.build_encoder(name, weights=str(path)).conv3.out_channels == 128
