"""Models of versions 1.0 and 2 have the state-dict keys and outputs of the published models."""

from functools import cache, lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import assert_golden, empty, fill, golden, golden_input
from torch import nn

from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.weights import LEGACY_SUFFIXES

MODELS, V1 = golden("golden_models"), golden("golden_v1")
KEYS, KEYS_V1 = golden("state_dict_keys"), golden("state_dict_keys_v1")
DTYPES = ((torch.float32, 1e-4), (torch.float64, 1e-8))  # (dtype, relative tolerance)
OLD = {"resnet34": "resnet34_v1", "resnet50": "resnet50_v1"}  # name in version 1.0 -> name now


def encoder_of(name):
    return empty(ModelBuilder.build_encoder, arch=name, pretrained=False)


@lru_cache(maxsize=1)
def filled_encoder(name):
    return fill(encoder_of(name), MODELS["_about"]["gains"][name]["encoder"]).eval()


def assert_keys_and_size(module, entries, model):
    published = [(key, tuple(shape)) for key, shape in entries if not key.endswith(LEGACY_SUFFIXES)]
    assert [(key, tuple(value.shape)) for key, value in module.state_dict().items()] == published
    assert model is None or sum(p.numel() for p in module.parameters()) == model["params"]


def vgg_is_long(names):
    return [pytest.param(name, marks=[pytest.mark.long] * ("vgg" in name)) for name in names]


@pytest.mark.parametrize(("keys", "models"), [(KEYS, MODELS), (KEYS_V1, V1)], ids=["version 2", "version 1.0"])
def test_keys_of_decoders(keys, models):
    for name, entries in keys["decoders"].items():
        arch, dim = name.split("/fc")
        decoder = empty(ModelBuilder.build_decoder, arch=arch, fc_dim=int(dim))
        assert_keys_and_size(decoder, entries, models["decoders"].get(name))


@pytest.mark.parametrize("name", KEYS["encoders"])
def test_keys_and_feature_maps_of_encoder(name):
    encoder, gold = filled_encoder(name), MODELS["encoders"][name]
    assert_keys_and_size(encoder, KEYS["encoders"][name], gold)
    for dtype, relative in DTYPES:
        with torch.no_grad():
            maps = encoder.to(dtype)(golden_input(*gold["input_hw"]).to(dtype), return_feature_maps=True)
        assert tuple(x.shape[1] for x in maps) == encoder.out_channels
        for x, expected in zip(maps, gold["features"]["soft"], strict=True):
            assert_golden(x, expected, relative, values=32)


@lru_cache(maxsize=1)
def filled_maps(name, size):
    """Return the feature maps of an encoder in float32 and float64."""
    encoder = filled_encoder(name)
    with torch.no_grad():
        return [encoder.to(d)(golden_input(*size).to(d), return_feature_maps=True) for d, _ in DTYPES]


class ComputedMaps(nn.Module):
    """Encoder that returns precomputed feature maps."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, x, return_feature_maps):
        return list(self.maps)


def filled_decoder(name):
    """Return the decoder of a pair such as `resnet50+upernet`."""
    pair = MODELS["pairs"][name]
    decoder = empty(ModelBuilder.build_decoder, arch=pair["decoder"], fc_dim=pair["fc_dim"])
    return fill(decoder, MODELS["_about"]["gains"][pair["encoder"]]["decoder"]).eval()


@pytest.mark.parametrize("name", sorted(MODELS["pairs"], key=lambda name: MODELS["pairs"][name]["encoder"]))
def test_outputs_loss_and_accuracy_of_pair(name):
    pair, gold, decoder = MODELS["pairs"][name], MODELS["pairs"][name]["soft"], filled_decoder(name)
    size = tuple(gold["softmax"]["shape"][-2:])
    label = torch.from_numpy(np.random.default_rng(1).integers(-1, 150, (2, *gold["label_hw"])))
    for (dtype, relative), maps in zip(DTYPES, filled_maps(pair["encoder"], size), strict=True):
        module = SegmentationModule(
            ComputedMaps(maps), decoder.to(dtype), nn.NLLLoss(ignore_index=-1), gold["deep_sup_scale"]
        )
        x = golden_input(*size).to(dtype)
        with torch.no_grad():
            outputs = {"softmax": module({"img_data": x}, segSize=size)}
            loss, accuracy = module({"img_data": x, "seg_label": label})
            log_softmax = decoder(maps)
        log_softmax = log_softmax if isinstance(log_softmax, tuple) else (log_softmax,)
        outputs |= dict(zip(("log_softmax", "log_softmax_deepsup"), log_softmax, strict=False))
        assert ("log_softmax_deepsup" in gold) == ("log_softmax_deepsup" in outputs)
        for key in gold.keys() & outputs.keys():
            assert_golden(outputs[key], gold[key], relative)
        assert loss.item() == pytest.approx(gold["loss"], rel=max(relative / 10, 1e-8))
        assert accuracy.item() == pytest.approx(gold["acc"], rel=1e-6)


@cache
def version_1_features(name):
    """Return an encoder of version 1.0, and a list of its feature maps in float32 and float64."""
    encoder = fill(encoder_of(OLD.get(name, name)), V1["encoders"][name]["gains"][0]).eval()
    with torch.no_grad():
        return encoder, [encoder.to(d)(golden_input(72, 104).to(d), return_feature_maps=True) for d, _ in DTYPES]


@pytest.mark.parametrize("name", vgg_is_long(V1["encoders"]))
def test_keys_and_features_of_version_1(name):
    encoder, maps = version_1_features(name)
    assert_keys_and_size(encoder, KEYS_V1["encoders"][name], V1["encoders"][name])
    for (_, relative), (*_, last) in zip(DTYPES, maps, strict=True):
        assert_golden(last, V1["encoders"][name]["features"]["soft"], relative, values=32)


@pytest.mark.parametrize("name", vgg_is_long(V1["pairs"]))
def test_outputs_of_version_1(name):
    """Decoders of version 1.0 use `align_corners=True`; the golden file also has outputs for False."""
    pair, (encoder_name, decoder_name) = V1["pairs"][name], name.split("+")
    gain = V1["encoders"][encoder_name]["gains"][1]
    decoder = fill(empty(ModelBuilder.build_decoder, decoder_name, fc_dim=pair["fc_dim"]), gain).eval()
    assert decoder.align_corners
    for (dtype, relative), maps in zip(DTYPES, version_1_features(encoder_name)[1], strict=True):
        for aligned in (True, False):
            decoder.align_corners = aligned
            with torch.no_grad():
                softmax = decoder.to(dtype)(maps, segSize=(72, 104))
                log_softmax = F.log_softmax(decoder.resize(decoder.logits(maps)[0], (72, 104)), dim=1)
            assert_golden(softmax, pair["soft"][f"softmax_ac_{str(aligned).lower()}"], relative)
            assert_golden(log_softmax, pair["soft"][f"log_softmax_ac_{str(aligned).lower()}"], relative)


@pytest.mark.parametrize("name", OLD)
def test_version_1_is_recognized_by_its_weights(name, tmp_path):
    path = tmp_path / "encoder.pth"
    old = ModelBuilder.build_encoder(f"{name}_v1", pretrained=False)
    torch.save(old.state_dict(), path)
    loaded = ModelBuilder.build_encoder(name, weights=str(path))
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in loaded.state_dict().items())
    torch.save(ModelBuilder.build_encoder(name, pretrained=False).state_dict(), path)
    assert ModelBuilder.build_encoder(name, weights=str(path)).conv3.out_channels == 128
