"""PSPNet and DeepLabV3 have the same outputs as in the Cityscapes toolbox, for the same checkpoint."""

from functools import partial

import pytest
import torch
from golden import assert_golden, fill_value, golden, golden_input

from mit_semseg.lib.nn import InPlaceABNSync
from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import resize

GOLD, KEYS = golden("golden_toolbox")["models"], golden("state_dict_keys_toolbox")
ARCHITECTURES = {"pspnet": "psp_deepsup", "deeplabv3": "aspp_deepsup"}
PLAIN = ({}, {})
INPLACE = ({"norm_layer": partial(InPlaceABNSync, activation="none")}, {"norm_layer": InPlaceABNSync})


@pytest.fixture(scope="module", params=ARCHITECTURES)
def network(request, tmp_path_factory):
    """Return a network name and a checkpoint in the toolbox format (one state dict without `num_batches_tracked`)."""
    entries = {key: shape for key, shape in KEYS[request.param] if not key.endswith("num_batches_tracked")}
    state = {key: torch.from_numpy(fill_value(key, shape, 0.7)) for key, shape in entries.items()}
    path = tmp_path_factory.mktemp("toolbox") / f"{request.param}.pth"
    torch.save(state, path)
    return request.param, path


def load(name, path, norms):
    encoder = ModelBuilder.build_encoder("resnet101_cityscapes", weights=str(path), **norms[0])
    options = {"num_class": 19, "in_channels": encoder.out_channels, "weights": str(path), **norms[1]}
    return encoder.eval(), ModelBuilder.build_decoder(ARCHITECTURES[name], **options).eval()


@pytest.mark.parametrize("norms", [PLAIN, INPLACE], ids=["plain", "inplace"])
def test_outputs_from_inplace_norms(network, norms):
    """Plain batch norms get the scale |weight| + eps, and give the same outputs as in-place norms."""
    name, path = network
    encoder, decoder = load(name, path, norms)
    assert sum(p.numel() for part in (encoder, decoder) for p in part.parameters()) == GOLD[name]["params"]
    for dtype, tolerance, height, width in ((torch.float32, 1e-4, 72, 104), (torch.float64, 1e-8, 97, 129)):
        with torch.no_grad():
            maps = encoder.to(dtype)(golden_input(height, width).to(dtype), return_feature_maps=True)
            outputs = decoder.to(dtype).logits(maps)
        expected = GOLD[name][f"sizes_{height}x{width}"]
        assert [list(x.shape) for x in maps] == [expected[f"layer{i}"] for i in (1, 2, 3, 4)]
        gold = GOLD[name]["outputs"][f"soft_{height}x{width}_iabn"]
        for output, key in zip(outputs, ("out", "dsn"), strict=True):
            # Plain batch norms store |weight| + eps, which is rounded to float32.
            assert_golden(output, gold[key], max(tolerance, 5e-7 if norms is PLAIN else 0))
        upsampled = resize(outputs[0], (height, width), align_corners=decoder.align_corners)
        histogram = torch.bincount(upsampled.argmax(1).flatten(), minlength=19)
        assert (histogram - torch.tensor(gold["upsampled_argmax_hist"])).abs().sum() <= 4  # nearly equal scores


def test_outputs_from_batch_norms(network):
    """A file with `num_batches_tracked` was trained with plain batch norms, so their scales are not changed."""
    name, path = network
    state = torch.load(path, weights_only=True)
    means = [key for key in state if "running_mean" in key]
    state |= {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in means}
    torch.save(state, path.with_name("batch_norms.pth"))
    encoder, decoder = load(name, path.with_name("batch_norms.pth"), PLAIN)
    with torch.no_grad():
        outputs = decoder.double().logits(encoder.double()(golden_input(97, 129).double(), return_feature_maps=True))
    for output, key in zip(outputs, ("out", "dsn"), strict=True):
        assert_golden(output, GOLD[name]["outputs"]["soft_97x129_bn"][key], 1e-8)
