"""Every pair builds, trains and infers at any size; layers do what they say."""

import random
from functools import lru_cache, partial

import pytest
import torch
from near import assert_near
from torch import nn

from mit_semseg.dataset.transforms import NORMALIZATIONS
from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.engine.losses import LOSSES
from mit_semseg.lib.nn import InPlaceABNSync, SynchronizedBatchNorm2d
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.layers import NORMS, dilation_of_stage

NUM_CLASS = 5


def build(encoder, decoder, num_class=NUM_CLASS, output_stride=None):
    enc = ModelBuilder.build_encoder(encoder, pretrained=False, output_stride=output_stride)
    dec = ModelBuilder.build_decoder(decoder, num_class=num_class, in_channels=enc.out_channels)
    return SegmentationModule(enc, dec, MaskedNLLLoss(), 0.4)


# Networks of version 1.0: the same as another one but for a stride or the stem, or very large. Some decoders will do.
FEW = {name: ("psp_bilinear", "upernet_lite") for name in ENCODERS if "_v1" in name or "_dilated" in name}
FEW |= {
    "resnet101_cityscapes": ("psp_deepsup", "aspp"),
    "vgg16_dilated8": ("c1_deepsup", "upernet_lite"),
    "vgg19_dilated8": ("c1_bilinear",),
}
# The toolbox's heads are built from the channels alone, as PPM is: some encoders will do.
TOOLBOX = dict.fromkeys(("psp", "psp_deepsup", "aspp", "aspp_deepsup"), ("mobilenetv2dilated", "resnet18", "hrnetv2"))


def is_large(encoder, decoder):
    """Whether a pair takes seconds; the 101 layers do what the 50 do."""
    if "vgg" in encoder:
        return decoder != "c1_deepsup"
    return "101" in encoder and decoder not in ("c1_deepsup", "psp_deepsup")


PAIRS = [
    pytest.param(encoder, decoder, marks=[pytest.mark.long] * is_large(encoder, decoder))
    for encoder in ENCODERS
    for decoder in FEW.get(encoder, DECODERS)
    if encoder in FEW or encoder in TOOLBOX.get(decoder, ENCODERS)
]


@lru_cache(maxsize=1)
def encoder_of(name):
    return ModelBuilder.build_encoder(name, pretrained=False)


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_every_pair_trains_and_infers(encoder, decoder):
    """Batch of one, the smallest picture and one of random odd sides, whose scores are as large as it is; training on
    the 1x1 pooled map does not crash."""
    enc = encoder_of(encoder)
    module = SegmentationModule(
        enc,
        ModelBuilder.build_decoder(decoder, num_class=NUM_CLASS, in_channels=enc.out_channels),
        MaskedNLLLoss(),
        0.4,
    )
    module.train()
    x = torch.randn(1, 3, 33, 33)
    loss, accuracy = module({"img_data": x, "seg_label": torch.randint(-1, NUM_CLASS, (1, 5, 5))})
    loss.backward()
    assert torch.isfinite(loss)
    assert 0 <= accuracy <= 1
    # A parameter without a gradient would keep the processes of a job waiting for each other.
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in module.decoder.parameters())
    module.eval()
    with torch.no_grad():
        rng = random.Random(f"{encoder} {decoder}")
        size = rng.randrange(33, 80, 2), rng.randrange(33, 80, 2)
        scores = module({"img_data": torch.randn(1, 3, *size)}, segSize=size)
    assert scores.shape == (1, NUM_CLASS, *size)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, *size))


@pytest.mark.long
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_single_pair_infers_at_random_odd_sizes(encoder):
    enc, rng = encoder_of(encoder), random.Random(encoder)
    for decoder in DECODERS:
        dec = ModelBuilder.build_decoder(decoder, num_class=NUM_CLASS, in_channels=enc.out_channels)
        size = rng.randrange(33, 64, 2), rng.randrange(33, 64, 2)
        with torch.inference_mode():
            scores = SegmentationModule(enc, dec, None).eval()({"img_data": torch.randn(1, 3, *size)}, segSize=size)
        assert scores.shape == (1, NUM_CLASS, *size), decoder
        torch.testing.assert_close(scores.sum(1), torch.ones(1, *size))
    enc.zero_grad(set_to_none=True)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18", "resnet50", "hrnetv2"])
def test_output_stride(name, stride):
    enc = ModelBuilder.build_encoder(name, pretrained=False, output_stride=stride).eval()
    with torch.no_grad():
        last = enc(torch.randn(1, 3, 64, 96), return_feature_maps=True)[-1]
    assert last.shape[-2:] == (64 // stride, 96 // stride)
    assert enc.output_stride == stride


def test_output_stride_keeps_the_weights_and_the_receptive_grid():
    """At stride 8 every 4th position of the dilated network is the undilated one, away from the borders."""
    plain = ModelBuilder.build_encoder("resnet18", pretrained=False).eval()
    dilated = ModelBuilder.build_encoder("resnet18dilated", pretrained=False).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        a, b = plain(x)[0], dilated(x)[0][..., ::4, ::4]
    assert_near(a[..., 6:10, 6:10], b[..., 6:10, 6:10])


def test_dilation_rule():
    assert dilation_of_stage(2, 8, 32) == (2, 1, 1)
    assert dilation_of_stage(2, 8, 8) == (1, 1, 2)
    assert dilation_of_stage(2, 16, 8) == (1, 2, 4)
    assert dilation_of_stage(2, 16, 16) == (1, 1, 2)
    assert dilation_of_stage(1, 16, 8) == (1, 2, 2)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"did you mean 'resnet50dilated'.*hrnetv2"):
        ModelBuilder.build_encoder("resnet50dilatet", pretrained=False)
    with pytest.raises(ValueError, match=r"no decoder 'pspnet'.*upernet_lite"):
        ModelBuilder.build_decoder("pspnet")
    with pytest.raises(ValueError, match="output stride 4 of resnet18"):
        ModelBuilder.build_encoder("resnet18", pretrained=False, output_stride=4)


def test_config_names_are_the_builder_names():
    from mit_semseg.config.defaults import DECODER_NAMES, ENCODER_NAMES, OPTIONS

    assert OPTIONS["MODEL.norm"].choices == tuple(NORMS)
    assert OPTIONS["TRAIN.loss"].choices == LOSSES
    assert OPTIONS["DATASET.normalization"].choices == NORMALIZATIONS
    assert tuple(ENCODERS) == ENCODER_NAMES
    assert tuple(DECODERS) == DECODER_NAMES


def test_deep_supervision_weight_and_its_absence():
    torch.manual_seed(0)
    module = build("resnet18dilated", "c1_deepsup").eval()
    batch = {"img_data": torch.randn(2, 3, 64, 64), "seg_label": torch.randint(-1, NUM_CLASS, (2, 8, 8))}
    with torch.no_grad():
        losses = {}
        for scale in (None, 0.0, 0.4, 1.0):
            module.deep_sup_scale = scale
            losses[scale] = module(batch)[0].item()
    assert losses[None] == losses[0.0]
    assert losses[0.4] - losses[0.0] == pytest.approx(0.4 * (losses[1.0] - losses[0.0]), rel=1e-5)


def test_loss_ignores_padding_and_survives_nothing_labelled():
    log_probs = torch.randn(2, 4, 6, 6, dtype=torch.float64).log_softmax(1).requires_grad_()
    label = torch.randint(-1, 4, (2, 6, 6))
    expected = nn.NLLLoss(ignore_index=-1)(log_probs, label)
    torch.testing.assert_close(MaskedNLLLoss()(log_probs, label), expected)
    nothing = MaskedNLLLoss()(log_probs, torch.full_like(label, -1))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(log_probs.grad, torch.zeros_like(log_probs))


def test_label_resolution_may_differ_from_the_decoder():
    module = build("resnet18", "c1_deepsup")
    for size in ((16, 16), (8, 8), (2, 2)):
        loss, _ = module({"img_data": torch.randn(1, 3, 64, 64), "seg_label": torch.randint(0, NUM_CLASS, (1, *size))})
        assert torch.isfinite(loss)


def test_inference_does_not_depend_on_use_softmax():
    enc = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    outputs = []
    for flag in (True, False):
        torch.manual_seed(3)
        dec = ModelBuilder.build_decoder("c1", fc_dim=512, num_class=4, use_softmax=flag)
        module = SegmentationModule(enc, dec, None).eval()
        with torch.no_grad():
            outputs.append(module({"img_data": torch.ones(1, 3, 40, 40)}, segSize=(40, 40)))
    torch.testing.assert_close(*outputs)
    with torch.no_grad():
        own = module.decoder(enc.eval()(torch.ones(1, 3, 40, 40), return_feature_maps=True))
    torch.testing.assert_close(own.exp().sum(1), torch.ones(1, 5, 5))


def test_single_value_batch_norm_learns_running_estimates():
    """One value per channel: the running estimates converge to mean and variance of the stream."""
    torch.manual_seed(0)
    norm = SynchronizedBatchNorm2d(3, momentum=0.01)
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    for _ in range(3000):
        y = norm((mean + std * torch.randn(3)).view(1, 3, 1, 1))
    assert y.shape == (1, 3, 1, 1)
    torch.testing.assert_close(norm.running_mean, mean, atol=0.35, rtol=0.1)
    torch.testing.assert_close(norm.running_var, std**2, atol=0.1, rtol=0.35)


def test_several_values_use_pytorchs_own_batch_norm():
    ours, theirs = SynchronizedBatchNorm2d(4), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert ours.momentum == 0.1
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["batch", "inplace"])  # every other test is about the third
@pytest.mark.parametrize("encoder", ["mobilenetv2dilated", "resnet18dilated", "resnet50dilated", "hrnetv2"])
def test_every_norm_trains(encoder, norm):
    enc = ModelBuilder.build_encoder(encoder, pretrained=False, norm_layer=NORMS[norm])
    for decoder in DECODERS if (encoder, norm) == ("resnet18dilated", "inplace") else ["psp_deepsup"]:
        options = {"in_channels": enc.out_channels, "norm_layer": NORMS[norm]}
        dec = ModelBuilder.build_decoder(decoder, num_class=NUM_CLASS, **options)
        module = SegmentationModule(enc, dec, MaskedNLLLoss(), 0.4).train()
        label = torch.randint(0, NUM_CLASS, (2, 5, 5))
        loss, _ = module({"img_data": torch.randn(2, 3, 40, 40), "seg_label": label})
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        kinds = {
            type(part).__name__ for part in module.modules() if "Norm" in type(part).__name__ or "ABN" in str(part)
        }
        assert ("InPlaceABNSync" in kinds) == (norm == "inplace")
        enc.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18", "hrnetv2"])
def test_inplace_norms_without_activation_change_nothing(name):
    """Output and gradients of a network with in-place norms of positive scales, next to ordinary ones."""
    options = ({}, {"norm_layer": partial(InPlaceABNSync, activation="none", eps=1e-12)})
    encoders = [ModelBuilder.build_encoder(name, pretrained=False, **kwargs).double() for kwargs in options]
    for part in encoders[0].modules():
        if isinstance(part, SynchronizedBatchNorm2d):
            part.eps = 1e-12
    encoders[1].load_state_dict(encoders[0].state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for encoder in encoders:
        maps = encoder(x, return_feature_maps=True)
        sum(m.square().mean() for m in maps).backward()
        results.append([maps[-1], *(p.grad for p in encoder.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-8)


def test_aspp_dilates_as_the_output_stride_says():
    for stride, rates in ((8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))):
        aspp = ModelBuilder.build_decoder("aspp", fc_dim=8, num_class=2, output_stride=stride)
        assert tuple(getattr(aspp, f"conv{i}")[0].dilation[0] for i in (3, 4, 5)) == rates
