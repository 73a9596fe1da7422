"""Encoders, decoders, and networks built from them."""

import random
from functools import lru_cache

import pytest
import torch
from golden import empty

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.lib.nn import InPlaceABNSync, SynchronizedBatchNorm2d
from mit_semseg.lib.utils import UserError
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.layers import NORMS

NUM_CLASS = 5


@lru_cache(maxsize=1)
def encoder_of(name):
    return ModelBuilder.build_encoder(name, pretrained=False)


def network(encoder, decoder, norm="sync"):
    options = {"num_class": NUM_CLASS, "in_channels": encoder.out_channels, "norm_layer": NORMS[norm]}
    return SegmentationModule(encoder, ModelBuilder.build_decoder(decoder, **options), MaskedNLLLoss(), 0.4)


# These encoders are tested with every decoder; other encoders have equal channels and strides, and get one decoder.
DIFFERENT = ("mobilenetv2dilated", "resnet18dilated", "hrnetv2")
LONG = (
    *("efficientnet_lite0", "efficientnet_lite0dilated", "resnet18", "resnet50", "resnet50dilated"),
    *("resnet34_dilated16", "resnet50_dilated16", "vgg16_dilated8"),
)
PAIRS = [
    pytest.param(encoder, decoder, marks=[pytest.mark.long] * (encoder not in DIFFERENT and decoder != "c1_deepsup"))
    for encoder in ENCODERS
    for decoder in (DECODERS if encoder in DIFFERENT + LONG else ["c1_deepsup"])
]


def test_every_encoder_has_the_channels_and_stride_of_one_that_is_tested_with_all_decoders():
    encoders = {name: empty(ModelBuilder.build_encoder, name, pretrained=False) for name in ENCODERS}
    shapes = {name: (encoder.out_channels, encoder.output_stride) for name, encoder in encoders.items()}
    assert set(shapes.values()) == {shapes[name] for name in DIFFERENT + LONG}


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_every_pair_trains_and_infers(encoder, decoder):
    """Train on one image of 33x33 pixels with a 5x5 label, then run inference at a random odd size."""
    module = network(encoder_of(encoder), decoder).train()
    batch = {"img_data": torch.randn(1, 3, 33, 33), "seg_label": torch.randint(-1, NUM_CLASS, (1, 5, 5))}
    # oneDNN takes 18 s for the gradient of the 7x7 convolution of VGG.
    with torch.backends.mkldnn.flags(enabled="vgg" not in encoder):
        loss, accuracy = module(batch)
        loss.backward()
    assert torch.isfinite(loss)
    assert 0 <= accuracy <= 1
    # DistributedDataParallel needs a gradient for every parameter.
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in module.decoder.parameters())
    module.zero_grad(set_to_none=True)
    rng = random.Random(f"{encoder} {decoder}")
    size = rng.randrange(33, 80, 2), rng.randrange(33, 80, 2)
    with torch.no_grad():
        scores = module.eval()({"img_data": torch.randn(1, 3, *size)}, segSize=size)
    assert scores.shape == (1, NUM_CLASS, *size)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, *size))


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["mobilenetv2dilated", "efficientnet_lite0", "resnet18", "resnet50", "hrnetv2"])
def test_output_stride_sets_the_size_of_the_last_feature_map(name, stride):
    encoder = ModelBuilder.build_encoder(name, pretrained=False, output_stride=stride).eval()
    with torch.no_grad():
        last = encoder(torch.randn(1, 3, 64, 96), return_feature_maps=True)[-1]
    assert last.shape[-2:] == (64 // stride, 96 // stride)
    assert encoder.output_stride == stride
    with pytest.raises(ValueError, match="output stride 2"):
        ModelBuilder.build_encoder(name, pretrained=False, output_stride=2)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"'resnet50dilatet'.*hrnetv2.*did you mean resnet50dilated"):
        ModelBuilder.build_encoder("resnet50dilatet", pretrained=False)
    with pytest.raises(ValueError, match=r"'pspnet'.*upernet_lite"):
        ModelBuilder.build_decoder("pspnet")


def test_deep_supervision_loss_is_weighted():
    module = network(encoder_of("resnet18dilated"), "c1_deepsup").eval()
    batch = {"img_data": torch.randn(2, 3, 64, 64), "seg_label": torch.randint(-1, NUM_CLASS, (2, 8, 8))}
    losses = {}
    for module.deep_sup_scale in (None, 0.0, 0.4, 1.0):
        with torch.no_grad():
            losses[module.deep_sup_scale] = module(batch)[0].item()
    assert losses[None] == losses[0.0]
    assert losses[0.4] - losses[0.0] == pytest.approx(0.4 * (losses[1.0] - losses[0.0]), rel=1e-5)


def test_decoder_without_deep_supervision_refuses_it():
    with pytest.raises(ValueError, match="UPerNet"):
        ModelBuilder.build_decoder("upernet", deepsup=True)


def test_running_statistics_converge_with_one_value_per_channel():
    norm = SynchronizedBatchNorm2d(3, momentum=0.01)
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    for _ in range(3000):
        y = norm((mean + std * torch.randn(3)).view(1, 3, 1, 1))
    assert y.shape == (1, 3, 1, 1)
    torch.testing.assert_close(norm.running_mean, mean, atol=0.35, rtol=0.1)
    torch.testing.assert_close(norm.running_var, std**2, atol=0.1, rtol=0.35)


@pytest.mark.parametrize("norm", ["batch", "inplace"])  # "sync" is tested above
@pytest.mark.parametrize("encoder", ["mobilenetv2dilated", "resnet18dilated", "hrnetv2"])
def test_every_norm_trains(encoder, norm):
    enc = ModelBuilder.build_encoder(encoder, pretrained=False, norm_layer=NORMS[norm])
    for decoder in DECODERS if (encoder, norm) == ("resnet18dilated", "inplace") else ["psp_deepsup"]:
        module = network(enc, decoder, norm).train()
        batch = {"img_data": torch.randn(2, 3, 40, 40), "seg_label": torch.randint(0, NUM_CLASS, (2, 5, 5))}
        module(batch)[0].backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        assert any(isinstance(layer, InPlaceABNSync) for layer in module.modules()) == (norm == "inplace")
        enc.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))])
def test_aspp_dilation_depends_on_the_output_stride(stride, rates):
    aspp = ModelBuilder.build_decoder("aspp", fc_dim=8, num_class=2, output_stride=stride)
    assert tuple(getattr(aspp, f"conv{i}")[0].dilation[0] for i in (3, 4, 5)) == rates
