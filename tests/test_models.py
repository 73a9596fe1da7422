"""Encoders, decoders and the network built from them."""

import random
from functools import lru_cache, partial

import pytest
import torch
from near import assert_near

from mit_semseg.config.defaults import OPTIONS
from mit_semseg.dataset.transforms import NORMALIZATIONS
from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.lib.nn import InPlaceABNSync, SynchronizedBatchNorm2d
from mit_semseg.lib.utils import UserError
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.layers import NORMS, dilation_of_stage

NUM_CLASS = 5


@lru_cache(maxsize=1)
def encoder_of(name):
    return ModelBuilder.build_encoder(name, pretrained=False)


def network(encoder, decoder, norm="sync"):
    options = {"num_class": NUM_CLASS, "in_channels": encoder.out_channels, "norm_layer": NORMS[norm]}
    return SegmentationModule(encoder, ModelBuilder.build_decoder(decoder, **options), MaskedNLLLoss(), 0.4)


# Encoders that differ from another one in a stride or the stem, or are very large, are tested with few decoders.
DECODERS_OF = {name: ("psp_bilinear", "upernet_lite") for name in ENCODERS if "_v1" in name or "_dilated" in name}
DECODERS_OF |= {"resnet101_cityscapes": ("psp_deepsup", "aspp"), "vgg16_dilated8": ("c1_deepsup",)}
DECODERS_OF |= {"vgg19_dilated8": ()}
ENCODERS_OF = dict.fromkeys(
    ("psp", "psp_deepsup", "aspp", "aspp_deepsup"),
    ("mobilenetv2dilated", "resnet18", "hrnetv2", "resnet101_cityscapes"),
)


def is_long(encoder, decoder):
    if decoder not in DECODERS_OF.get(encoder, DECODERS) or encoder not in ENCODERS_OF.get(decoder, ENCODERS):
        return True
    return "101" in encoder and decoder not in ("c1_deepsup", "psp_deepsup")


PAIRS = [
    pytest.param(encoder, decoder, marks=[pytest.mark.long] * is_long(encoder, decoder))
    for encoder in ENCODERS
    for decoder in DECODERS
]


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_every_pair_trains_and_infers(encoder, decoder):
    """Train on a single 33x33 image with a 5x5 label (the pooled map is 1x1); infer at a random odd size."""
    module = network(encoder_of(encoder), decoder).train()
    batch = {"img_data": torch.randn(1, 3, 33, 33), "seg_label": torch.randint(-1, NUM_CLASS, (1, 5, 5))}
    loss, accuracy = module(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert 0 <= accuracy <= 1
    # A parameter without gradient would block DistributedDataParallel.
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
@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18", "resnet50", "hrnetv2"])
def test_output_stride_sets_the_size_of_the_last_feature_map(name, stride):
    encoder = ModelBuilder.build_encoder(name, pretrained=False, output_stride=stride).eval()
    with torch.no_grad():
        last = encoder(torch.randn(1, 3, 64, 96), return_feature_maps=True)[-1]
    assert last.shape[-2:] == (64 // stride, 96 // stride)
    assert encoder.output_stride == stride


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2dilated", "hrnetv2", "vgg16_dilated8"])
def test_unsupported_output_stride_is_refused(name):
    with pytest.raises(ValueError, match="output stride 2"):
        ModelBuilder.build_encoder(name, pretrained=False, output_stride=2)


def test_dilated_encoder_equals_the_undilated_one_at_every_fourth_position():
    """Away from the borders, with the same weights."""
    plain = ModelBuilder.build_encoder("resnet18", pretrained=False).eval()
    dilated = ModelBuilder.build_encoder("resnet18dilated", pretrained=False).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        a, b = plain(x)[0], dilated(x)[0][..., ::4, ::4]
    assert_near(a[..., 6:10, 6:10], b[..., 6:10, 6:10])


def test_dilation_of_stage():
    """(stride, input stride, output stride) -> (stride, dilation of the first convolution, of the others)."""
    assert dilation_of_stage(2, 8, 32) == (2, 1, 1)
    assert dilation_of_stage(2, 8, 8) == (1, 1, 2)
    assert dilation_of_stage(2, 16, 8) == (1, 2, 4)
    assert dilation_of_stage(1, 16, 8) == (1, 2, 2)


@pytest.mark.parametrize("error", [ValueError, UserError])
def test_unknown_name_lists_the_valid_ones(error):
    with pytest.raises(error, match=r"'resnet50dilatet'.*'resnet50dilated'.*hrnetv2"):
        ModelBuilder.build_encoder("resnet50dilatet", pretrained=False)
    with pytest.raises(error, match=r"'pspnet'.*upernet_lite"):
        ModelBuilder.build_decoder("pspnet")


def test_choices_of_options_are_those_of_the_tables():
    assert OPTIONS["MODEL.norm"].choices == tuple(NORMS)
    assert OPTIONS["DATASET.normalization"].choices == tuple(NORMALIZATIONS)


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


def test_use_softmax_does_not_change_inference():
    encoder, outputs = encoder_of("resnet18dilated").eval(), []
    for use_softmax in (True, False):
        torch.manual_seed(3)
        decoder = ModelBuilder.build_decoder("c1", fc_dim=512, num_class=4, use_softmax=use_softmax).eval()
        with torch.no_grad():
            features = encoder(torch.ones(1, 3, 40, 40), return_feature_maps=True)
            outputs.append(decoder(features, segSize=(40, 40)))
            scores = decoder(features)
        probabilities = scores if use_softmax else scores.exp()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 5, 5))
    torch.testing.assert_close(*outputs)


def test_running_statistics_converge_with_one_value_per_channel():
    norm = SynchronizedBatchNorm2d(3, momentum=0.01)
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    for _ in range(3000):
        y = norm((mean + std * torch.randn(3)).view(1, 3, 1, 1))
    assert y.shape == (1, 3, 1, 1)
    torch.testing.assert_close(norm.running_mean, mean, atol=0.35, rtol=0.1)
    torch.testing.assert_close(norm.running_var, std**2, atol=0.1, rtol=0.35)


@pytest.mark.parametrize("norm", ["batch", "inplace"])  # "sync" is tested above
@pytest.mark.parametrize("encoder", ["mobilenetv2dilated", "resnet18dilated", "resnet50dilated", "hrnetv2"])
def test_every_norm_trains(encoder, norm):
    enc = ModelBuilder.build_encoder(encoder, pretrained=False, norm_layer=NORMS[norm])
    for decoder in DECODERS if (encoder, norm) == ("resnet18dilated", "inplace") else ["psp_deepsup"]:
        module = network(enc, decoder, norm).train()
        batch = {"img_data": torch.randn(2, 3, 40, 40), "seg_label": torch.randint(0, NUM_CLASS, (2, 5, 5))}
        module(batch)[0].backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        assert any(isinstance(layer, InPlaceABNSync) for layer in module.modules()) == (norm == "inplace")
        enc.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18", "hrnetv2"])
def test_inplace_norms_without_activation_equal_ordinary_ones(name):
    """Outputs and gradients, with positive scales."""
    options = ({}, {"norm_layer": partial(InPlaceABNSync, activation="none", eps=1e-12)})
    encoders = [ModelBuilder.build_encoder(name, pretrained=False, **kwargs).double() for kwargs in options]
    for layer in encoders[0].modules():
        if isinstance(layer, SynchronizedBatchNorm2d):
            layer.eps = 1e-12
    encoders[1].load_state_dict(encoders[0].state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for encoder in encoders:
        maps = encoder(x, return_feature_maps=True)
        sum(m.square().mean() for m in maps).backward()
        results.append([maps[-1], *(p.grad for p in encoder.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))])
def test_aspp_dilation_depends_on_the_output_stride(stride, rates):
    aspp = ModelBuilder.build_decoder("aspp", fc_dim=8, num_class=2, output_stride=stride)
    assert tuple(getattr(aspp, f"conv{i}")[0].dilation[0] for i in (3, 4, 5)) == rates
