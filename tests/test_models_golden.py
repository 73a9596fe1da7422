"""Models of version 2: state-dict keys and outputs equal those of the published models."""

import numpy as np
import pytest
import torch
from golden import empty, fill, golden, golden_input, sample
from torch import nn

from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.weights import LEGACY_SUFFIXES

MODELS, KEYS = golden("golden_models"), golden("state_dict_keys")
DTYPES = (torch.float32, torch.float64)


def encoder_of(name):
    return empty(ModelBuilder.build_encoder, arch=name, pretrained=False)


def published_keys(entries):
    return [(key, tuple(shape)) for key, shape in entries if not key.endswith(LEGACY_SUFFIXES)]


def own_keys(module):
    return [(key, tuple(value.shape)) for key, value in module.state_dict().items()]


@pytest.mark.parametrize("name", KEYS["encoders"])
def test_keys_of_encoder(name):
    encoder = encoder_of(name)
    assert own_keys(encoder) == published_keys(KEYS["encoders"][name])
    assert sum(p.numel() for p in encoder.parameters()) == MODELS["encoders"][name]["params"]


@pytest.mark.parametrize("name", KEYS["decoders"])
def test_keys_of_decoder(name):
    arch, dim = name.split("/fc")
    decoder = empty(ModelBuilder.build_decoder, arch=arch, fc_dim=int(dim), num_class=150)
    assert own_keys(decoder) == published_keys(KEYS["decoders"][name])
    if name in MODELS["decoders"]:
        assert sum(p.numel() for p in decoder.parameters()) == MODELS["decoders"][name]["params"]


@pytest.mark.parametrize("name", MODELS["encoders"])
def test_feature_maps_of_encoder(name):
    gold = MODELS["encoders"][name]
    encoder = fill(encoder_of(name), MODELS["_about"]["gains"][name]["encoder"]).eval()
    for dtype, relative in zip(DTYPES, (1e-4, 1e-8), strict=True):
        with torch.no_grad():
            maps = encoder.to(dtype)(golden_input(*gold["input_hw"]).to(dtype), return_feature_maps=True)
        assert tuple(x.shape[1] for x in maps) == encoder.out_channels
        for x, expected in zip(maps, gold["features"]["soft"], strict=True):
            assert list(x.shape) == expected["shape"]
            atol = relative * expected["absmax"]
            np.testing.assert_allclose(sample(x, 32), expected["values"], rtol=0, atol=atol)


def build_pair(name):
    pair = MODELS["pairs"][name]
    gains = MODELS["_about"]["gains"][pair["encoder"]]
    encoder = fill(encoder_of(pair["encoder"]), gains["encoder"])
    decoder = fill(empty(ModelBuilder.build_decoder, arch=pair["decoder"], fc_dim=pair["fc_dim"]), gains["decoder"])
    return SegmentationModule(encoder, decoder, nn.NLLLoss(ignore_index=-1), pair["soft"]["deep_sup_scale"]).eval()


def check_outputs(gold, softmax, log_softmax, *, exact):
    outputs = log_softmax if isinstance(log_softmax, tuple) else (log_softmax,)
    assert ("log_softmax_deepsup" in gold) == (len(outputs) == 2)
    checks = [("softmax", softmax), ("log_softmax", outputs[0]), ("log_softmax_deepsup", outputs[-1])]
    for key, tensor in checks:
        if key in gold:
            assert list(tensor.shape) == gold[key]["shape"]
            atol = (1e-8 if exact else 1e-4) * gold[key]["absmax"]
            np.testing.assert_allclose(sample(tensor, 64), gold[key]["values"], rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS["pairs"])
def test_outputs_loss_and_accuracy_of_pair(name):
    gold, module = MODELS["pairs"][name]["soft"], build_pair(name)
    size = tuple(gold["softmax"]["shape"][-2:])
    label = torch.from_numpy(np.random.default_rng(1).integers(-1, 150, (2, *gold["label_hw"])))
    maps = []
    module.encoder.register_forward_hook(lambda encoder, inputs, output: maps.append(output))
    for dtype in DTYPES:
        exact, x = dtype == torch.float64, golden_input(*size).to(dtype)
        with torch.no_grad():
            softmax = module.to(dtype)({"img_data": x}, segSize=size)
            loss, accuracy = module({"img_data": x, "seg_label": label})
            log_softmax = module.decoder(maps[-1])
        check_outputs(gold, softmax, log_softmax, exact=exact)
        assert loss.item() == pytest.approx(gold["loss"], rel=1e-8 if exact else 1e-5)
        assert accuracy.item() == pytest.approx(gold["acc"], rel=1e-6)
