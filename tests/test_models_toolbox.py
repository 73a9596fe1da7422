"""PSPNet and DeepLabV3 of the Cityscapes toolbox: outputs from its checkpoints equal its own."""

from functools import partial

import numpy as np
import pytest
import torch
from golden import fill_value, golden, golden_input, sample

from mit_semseg.lib.nn import InPlaceABNSync
from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import resize
from mit_semseg.models.weight_files import WeightsError

GOLD, KEYS = golden("golden_toolbox")["models"], golden("state_dict_keys_toolbox")
ARCHITECTURES = {"pspnet": "psp_deepsup", "deeplabv3": "aspp_deepsup"}
GAIN = 0.7
PLAIN = ({}, {})
INPLACE = ({"norm_layer": partial(InPlaceABNSync, activation="none")}, {"norm_layer": InPlaceABNSync})


@pytest.fixture(scope="module", params=ARCHITECTURES)
def network(request, tmp_path_factory):
    """Name and checkpoint file in the format of the toolbox: one state dict, without `num_batches_tracked`."""
    state = {
        key: torch.from_numpy(fill_value(key, shape, GAIN))
        for key, shape in KEYS[request.param]
        if not key.endswith("num_batches_tracked")
    }
    path = tmp_path_factory.mktemp("toolbox") / f"{request.param}.pth"
    torch.save(state, path)
    return request.param, path


def load(name, path, norms):
    encoder = ModelBuilder.build_encoder("resnet101_cityscapes", weights=str(path), **norms[0])
    channels = encoder.out_channels
    decoder = ModelBuilder.build_decoder(
        ARCHITECTURES[name], num_class=19, in_channels=channels, weights=str(path), **norms[1]
    )
    return encoder.eval(), decoder.eval()


@pytest.mark.parametrize("norms", [PLAIN, INPLACE], ids=["plain", "inplace"])
def test_outputs_from_inplace_norms(network, norms):
    """Ordinary norms are loaded with |weight| + eps and give the same outputs as in-place norms."""
    name, path = network
    encoder, decoder = load(name, path, norms)
    assert sum(p.numel() for part in (encoder, decoder) for p in part.parameters()) == GOLD[name]["params"]
    for dtype, tolerance, sizes in (
        (torch.float32, 1e-4, [(72, 104)]),
        (torch.float64, 1e-8, [(97, 129)] if norms is PLAIN else [(72, 104), (97, 129)]),
    ):
        for height, width in sizes:
            with torch.no_grad():
                maps = encoder.to(dtype)(golden_input(height, width).to(dtype), return_feature_maps=True)
                outputs = decoder.to(dtype).logits(maps)
            expected = GOLD[name][f"sizes_{height}x{width}"]
            assert [list(x.shape) for x in maps] == [expected[f"layer{i}"] for i in (1, 2, 3, 4)]
            gold = GOLD[name]["outputs"][f"soft_{height}x{width}_iabn"]
            for output, key in zip(outputs, ("out", "dsn"), strict=True):
                assert list(output.shape) == gold[key]["shape"]
                # |weight| + eps is rounded to float32 when it is loaded into ordinary norms.
                atol = max(tolerance, 5e-7 if norms is PLAIN else 0) * gold[key]["absmax"]
                np.testing.assert_allclose(sample(output, 64), gold[key]["values"], rtol=0, atol=atol)
            upsampled = resize(outputs[0], (height, width), align_corners=decoder.align_corners)
            histogram = torch.bincount(upsampled.argmax(1).flatten(), minlength=19)
            assert (histogram - torch.tensor(gold["upsampled_argmax_hist"])).abs().sum() <= 4  # near ties


def test_outputs_from_ordinary_norms(network):
    """A file with `num_batches_tracked` was trained with ordinary norms; its scales are not changed."""
    name, path = network
    state = torch.load(path, weights_only=True)
    state |= {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in state if "running_mean" in key
    }
    ordinary = path.with_name("ordinary.pth")
    torch.save(state, ordinary)
    encoder, decoder = load(name, ordinary, PLAIN)
    for height, width in ((72, 104), (97, 129)):
        with torch.no_grad():
            maps = encoder.double()(golden_input(height, width).double(), return_feature_maps=True)
            outputs = decoder.double().logits(maps)
        for output, key in zip(outputs, ("out", "dsn"), strict=True):
            gold = GOLD[name]["outputs"][f"soft_{height}x{width}_bn"][key]
            np.testing.assert_allclose(sample(output, 64), gold["values"], rtol=0, atol=1e-8 * gold["absmax"])


def test_wrong_decoder_and_number_of_classes_are_refused(network):
    name, path = network
    with pytest.raises(WeightsError, match="decoder c1"):
        ModelBuilder.build_decoder("c1", fc_dim=2048, num_class=19, weights=str(path))
    with pytest.raises(WeightsError, match="reset_classifier"):
        ModelBuilder.build_decoder(ARCHITECTURES[name], fc_dim=2048, num_class=20, weights=str(path))
    decoder = ModelBuilder.build_decoder(
        ARCHITECTURES[name], fc_dim=2048, num_class=20, weights=str(path), reset_classifier=True
    )
    assert decoder.conv_last.out_channels == 20
