"""A network in another precision, or compiled, is the network up to what its numbers can hold."""

import copy

import pytest
import torch
from near import assert_near
from test_folding import lively

from mit_semseg.evaluation import InferenceOptions, label_map, network
from mit_semseg.lib.utils import UserError
from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule

PICTURE = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))


def module_of(encoder, decoder):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=5, in_channels=enc.out_channels)
    return lively(SegmentationModule(enc, dec, None)).float()


@torch.inference_mode()
def logits_of(module, view, device="cpu"):
    return view.network(module, device).logits({"img_data": PICTURE})


@pytest.mark.parametrize("decoder", DECODERS)
def test_bfloat16_is_close(decoder):
    module = module_of("resnet18", decoder)
    exact, rounded = logits_of(module, InferenceOptions()), logits_of(module, InferenceOptions(precision="bf16"))
    assert rounded.dtype == torch.float32  # the classifier's; the network before it has 16 bits
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


@torch.inference_mode()
@pytest.mark.parametrize("encoder", ["mobilenetv2dilated", "resnet50_v1", "hrnetv2", "vgg16_dilated8"])
def test_a_network_of_16_bits_sees_the_picture_as_it_is(encoder):
    """Colours of 8 bits are finer than bfloat16 numbers."""
    network = InferenceOptions(precision="bf16").network(module_of(encoder, "c1"))
    exact, rounded = (network.logits({"img_data": x}) for x in (PICTURE, PICTURE.bfloat16().float()))
    assert not torch.equal(exact, rounded)
    kinds = [part.weight.dtype for part in network.modules() if isinstance(part, torch.nn.Conv2d)]
    assert kinds.count(torch.float32) == 2  # the first and the last
    assert kinds.count(torch.bfloat16) == len(kinds) - 2


@pytest.mark.parametrize(
    "view", [InferenceOptions(precision="bf16"), InferenceOptions(precision="bf16", window=(40, 40), flip=True)]
)
def test_probabilities_are_float32(view):
    model = view.network(module_of("resnet18", "c1"))
    scores = model({"img_data": PICTURE}, segSize=(64, 72))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 64, 72))
    labels = label_map(model, {"img_ori": torch.empty(64, 72, 3), "img_data": [PICTURE]}, view=view)
    assert labels.shape == (64, 72)


def test_the_module_itself_stays_as_it_is():
    module = module_of("resnet18", "c1")
    before = copy.deepcopy(module.state_dict())
    InferenceOptions(precision="bf16").network(module)
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.long
def test_compiled_is_the_same():
    module = module_of("resnet18", "c1")
    assert_near(logits_of(module, InferenceOptions(compiled=True)), logits_of(module, InferenceOptions()))


def test_what_a_processor_lacks_is_said(monkeypatch, caplog):
    module = module_of("resnet18", "c1")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        InferenceOptions(precision="fp16").network(module)
    monkeypatch.setattr(network, "cpu_has_bfloat16", lambda: False)
    InferenceOptions(precision="bf16").network(module)
    assert "no bfloat16 instructions" in caplog.text


@pytest.mark.parametrize("pair", [("mobilenetv2dilated", "ppm_deepsup"), ("resnet18", "upernet"), ("hrnetv2", "c1")])
def test_prepared_networks_have_the_same_probabilities(pair):
    """In float32, within 2e-5, for scores as large as a trained network's."""
    module = module_of(*pair)
    with torch.no_grad():
        last = [part for part in module.decoder.modules() if isinstance(part, torch.nn.Conv2d)][-1]
        scale = 10 / module.logits({"img_data": PICTURE}).abs().max()
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        prepared, plain = (
            m({"img_data": PICTURE}, segSize=(64, 72)) for m in (InferenceOptions().network(module), module)
        )
    assert (prepared - plain).abs().max() < 2e-5
