"""The Cityscapes toolbox's PSPNet and DeepLabV3: its checkpoints load, and give its numbers."""

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
    """Name, and a checkpoint file as the toolbox wrote it: one state dict, in-place norms count no batches."""
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
def test_outputs(network, norms):
    """Plain norms take over |weight| + eps from the file, so both give what the in-place network gave."""
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
                # Rounded to float32 once more, |weight| + eps differs a little from the golden run's.
                atol = max(tolerance, 5e-7 if norms is PLAIN else 0) * gold[key]["absmax"]
                np.testing.assert_allclose(sample(output, 64), gold[key]["values"], rtol=0, atol=atol)
            upsampled = resize(outputs[0], (height, width), align_corners=decoder.align_corners)
            histogram = torch.bincount(upsampled.argmax(1).flatten(), minlength=19)
            assert (histogram - torch.tensor(gold["upsampled_argmax_hist"])).abs().sum() <= 4  # near ties


def test_plain_batch_norm_weights(network):
    """A file with batch counters was trained with ordinary norms: its scales are taken as they are."""
    name, path = network
    state = torch.load(path, weights_only=True)
    state |= {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in state if "running_mean" in key
    }
    counted = path.with_name("counted.pth")
    torch.save(state, counted)
    encoder, decoder = load(name, counted, PLAIN)
    for height, width in ((72, 104), (97, 129)):
        with torch.no_grad():
            maps = encoder.double()(golden_input(height, width).double(), return_feature_maps=True)
            outputs = decoder.double().logits(maps)
        for output, key in zip(outputs, ("out", "dsn"), strict=True):
            gold = GOLD[name]["outputs"][f"soft_{height}x{width}_bn"][key]
            np.testing.assert_allclose(sample(output, 64), gold["values"], rtol=0, atol=1e-8 * gold["absmax"])


def test_a_network_that_does_not_fit_is_refused(network, tmp_path):
    name, path = network
    with pytest.raises(WeightsError, match=r"does not fit decoder c1: .*missing in the file"):
        ModelBuilder.build_decoder("c1", fc_dim=2048, num_class=19, weights=str(path))
    with pytest.raises(WeightsError, match="another number of classes"):
        ModelBuilder.build_decoder(ARCHITECTURES[name], fc_dim=2048, num_class=20, weights=str(path))
    decoder = ModelBuilder.build_decoder(
        ARCHITECTURES[name], fc_dim=2048, num_class=20, weights=str(path), reset_classifier=True
    )
    assert decoder.conv_last.out_channels == 20
