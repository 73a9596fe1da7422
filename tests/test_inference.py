"""Inference with sliding windows, flip, scales and precisions, compared with plain computations on whole images."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from near import assert_near
from scenes import tiny_module
from test_fuse_bn import randomize_norms

from mit_semseg.evaluation import InferenceOptions, Predictor, inference, label_map, sliding_window
from mit_semseg.evaluation.sliding_window import window_starts
from mit_semseg.lib.utils import UserError
from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule

CLASSES = 4


class LocalNetwork:
    """A random convolution; an output pixel depends on input pixels that are at most `reach` pixels away."""

    align_corners = False

    def __init__(self, reach=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        side = 2 * reach + 1
        self.weight = torch.randn(CLASSES, 3, side, side, generator=generator, dtype=torch.float64)
        self.reach, self.sizes, self.batch_sizes = reach, [], []

    def logits(self, feed):
        self.sizes.append(tuple(feed["img_data"].shape[-2:]))
        self.batch_sizes.append(len(feed["img_data"]))
        return F.conv2d(feed["img_data"], self.weight, padding=self.reach)


def image(height, width, seed=0):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def item_of(size, *scales):
    return {"img_ori": np.zeros((*size, 3), np.uint8), "img_data": list(scales)}


def probabilities(model, scales, size, **options):
    return Predictor(model, options=InferenceOptions(**options)).probabilities(scales, size)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    window=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    overlap=st.floats(0, 0.9),
    flip=st.booleans(),
)
def test_sliding_window_of_a_pointwise_network_equals_the_whole_image(size, window, overlap, flip):
    model, x = LocalNetwork(), image(*size)
    expected = probabilities(model, [x], size, flip=flip)
    scores = probabilities(model, [x], size, flip=flip, window_size=window, window_overlap=overlap)
    torch.testing.assert_close(scores, expected)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(1, 300), overlap=st.floats(0, 0.95))
def test_windows_cover_the_length_with_the_overlap(length, window, overlap):
    window = min(window, length)
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    assert all(1 <= step <= max(1, window * (1 - overlap)) for step in np.diff(starts))


def test_pixels_far_from_window_borders_equal_the_whole_image():
    """Pixels are far if the distance is at least 3 pixels, because the network has a reach of 3 pixels."""
    model, x, reach = LocalNetwork(reach=3), image(60, 90), 3
    expected = probabilities(model, [x], (60, 90))
    scores = probabilities(model, [x], (60, 90), window_size=(24, 30), window_overlap=0.25)
    interior = torch.ones(60, 90, dtype=torch.bool)
    for axis, window, length in ((0, 24, 60), (1, 30, 90)):
        for start in window_starts(length, window, 0.25):
            for border in (start, start + window):
                if 0 < border < length:
                    interior.narrow(axis, border - reach, 2 * reach).fill_(False)
    assert 0.3 < interior.float().mean() < 0.9
    torch.testing.assert_close(scores[:, interior], expected[:, interior])
    assert (scores - expected).abs().max() > 1e-3  # pixels near window borders differ


def test_overlapping_windows_are_averaged():
    """The expected value of a pixel is the mean over all windows that contain the pixel."""
    model, x = LocalNetwork(reach=2), image(40, 33)
    height, width, overlap = 16, 20, 0.5
    total, count = torch.zeros(CLASSES, 40, 33, dtype=torch.float64), torch.zeros(40, 33)
    for top in window_starts(40, height, overlap):
        for left in window_starts(33, width, overlap):
            region = np.s_[..., top : top + height, left : left + width]
            total[region] += model.logits({"img_data": x[region]})[0].softmax(0)
            count[region] += 1
    scores = probabilities(model, [x], (40, 33), window_size=(height, width), window_overlap=overlap)
    torch.testing.assert_close(scores, total / count)
    assert count.max() >= 4


@pytest.mark.parametrize(("elements", "windows"), [(1, 1), (2000, 2), (2**21, 8)])
def test_scales_and_flip_with_a_sliding_window(elements, windows, monkeypatch):
    """Probabilities of all scales are resized and averaged, for different numbers of rows and of windows per batch."""
    monkeypatch.setattr(label_map, "CPU_STRIP_ELEMENTS", elements)
    monkeypatch.setitem(sliding_window.MAX_WINDOWS, "cpu", windows)
    model, size = LocalNetwork(reach=1), (37, 53)
    scales = [image(*s) for s in ((24, 40), (37, 53), (80, 112))]
    options = {"flip": True, "window_size": (20, 24), "window_overlap": 0.4}
    expected = 0
    for x in scales:
        scores = probabilities(model, [x], tuple(x.shape[-2:]), **options)
        expected = expected + F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0] / len(scales)
    torch.testing.assert_close(probabilities(model, scales, size, **options), expected)
    labels = Predictor(model, options=InferenceOptions(**options)).label_map(item_of(size, *scales))
    assert np.array_equal(labels, expected.argmax(0).numpy())
    assert max(model.batch_sizes) == windows


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("decoder", ["c1", "psp_bilinear"])
def test_label_map_has_the_largest_probability(decoder, flip):
    """Test decoders with and without `align_corners`, at one scale and at three scales."""
    module = tiny_module()
    module.decoder = ModelBuilder.build_decoder(decoder, num_class=CLASSES, in_channels=(8, 16))
    torch.nn.init.normal_(module.decoder.conv_last.weight if decoder == "c1" else module.decoder.conv_last[-1].weight)
    predictor = Predictor(module, options=InferenceOptions(flip=flip))
    for sizes in ([(48, 64)], [(32, 40), (48, 64), (72, 96)]):
        item = item_of((45, 61), *(image(*s).float() for s in sizes))
        labels = predictor.label_map(item).long()
        scores = predictor.probabilities(item["img_data"], (45, 61))
        assert labels.unique().numel() > 1
        assert (scores.amax(0) - scores.gather(0, labels[None])[0]).max() < 1e-5
        classes, top = predictor.top_classes(item, 2)
        torch.testing.assert_close(torch.from_numpy(top[0]), scores.amax(0))
        assert classes.shape == (2, 45, 61)


def test_flip_is_the_mean_of_both_images():
    model, x = LocalNetwork(reach=2), image(20, 31)
    flipped = probabilities(model, [x.flip(-1)], (20, 31)).flip(-1)
    expected = (probabilities(model, [x], (20, 31)) + flipped) / 2
    torch.testing.assert_close(probabilities(model, [x], (20, 31), flip=True), expected)


def test_window_size_limits_the_input_of_the_network():
    model = LocalNetwork(reach=1)
    item = item_of((50, 70), image(50, 70), image(20, 28))
    Predictor(model, options=InferenceOptions(window_size=(32, 32))).label_map(item)
    assert set(model.sizes) == {(32, 32), (20, 28)}


@pytest.mark.parametrize("elements", [1, 2**24])
@pytest.mark.parametrize("decoder", ["c1", "psp"])
def test_windows_of_logits_are_resized_as_by_the_decoder(decoder, elements, monkeypatch):
    monkeypatch.setattr(label_map, "CPU_STRIP_ELEMENTS", elements)
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=4, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, dec, None).double().eval()
    x, options = image(70, 90), {"window_size": (48, 40), "window_overlap": 0.3, "flip": True}
    resized = LocalNetwork()  # its logits are log(p), because softmax(log(p)) = p
    resized.logits = lambda feed: module(feed, segSize=feed["img_data"].shape[-2:]).log()
    expected = probabilities(resized, [x], (60, 75), **options)
    torch.testing.assert_close(probabilities(module, [x], (60, 75), **options), expected)


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"window_size": (32, 32)}])
def test_batches_of_equal_sizes_give_the_same_label_maps(options, monkeypatch):
    """On GPUs, consecutive images of equal size form a batch, but not with sliding windows."""
    sizes = [(40, 56), (40, 56), (56, 40), (40, 56)]
    items = [item_of((h, w), image(h, w, seed), image(h // 2, w // 2, seed)) for seed, (h, w) in enumerate(sizes)]
    predictor = Predictor(tiny_module().double(), options=InferenceOptions(**options))
    expected = [predictor.label_map(item) for item in items]
    batch_sizes, logits = [], SegmentationModule.logits
    monkeypatch.setattr(
        SegmentationModule, "logits", lambda self, x: batch_sizes.append(len(x["img_data"])) or logits(self, x)
    )
    predictor.device = torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    for ours, one in zip(predictor.label_maps(items), expected, strict=True):
        assert np.array_equal(ours, one)
    assert max(batch_sizes) == (1 if "window_size" in options else 2)


# Precision

IMAGE = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))


def build(encoder, decoder):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=5, in_channels=enc.out_channels)
    return randomize_norms(SegmentationModule(enc, dec, None)).float()


def prepare(module, **options):
    return inference.prepare(module, "cpu", InferenceOptions(**options))


@torch.inference_mode()
@pytest.mark.parametrize("decoder", DECODERS)
def test_bfloat16_is_close_to_float32(decoder):
    module = build("resnet18", decoder)
    exact, rounded = (prepare(module, precision=p).logits({"img_data": IMAGE}) for p in ("auto", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


@torch.inference_mode()
@pytest.mark.parametrize(
    "encoder", ["mobilenetv2dilated", "resnet50_v1", "hrnetv2", pytest.param("vgg16_dilated8", marks=pytest.mark.long)]
)
def test_first_convolution_and_classifier_stay_in_float32(encoder):
    """Rounding normalized 8-bit colors to bfloat16 would lose information."""
    network = prepare(build(encoder, "c1"), precision="bf16")
    exact, rounded = (network.logits({"img_data": x}) for x in (IMAGE, IMAGE.bfloat16().float()))
    assert not torch.equal(exact, rounded)
    dtypes = [part.weight.dtype for part in network.modules() if isinstance(part, torch.nn.Conv2d)]
    assert dtypes.count(torch.float32) == 2
    assert dtypes.count(torch.bfloat16) == len(dtypes) - 2


def test_prepare_does_not_change_the_module():
    module = build("resnet18", "c1")
    before = copy.deepcopy(module.state_dict())
    prepare(module, precision="bf16")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.long
@torch.inference_mode()
def test_compiled_network_equals_the_eager_one():
    compiled, eager = (prepare(tiny_module(), compile=c) for c in (True, False))
    images = IMAGE.clone(), image(40, 104).float()
    compiled.logits({"img_data": images[0]})
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in images:
            assert_near(compiled.logits({"img_data": x}), eager.logits({"img_data": x}))


def test_precision_that_the_device_lacks_is_refused_or_warned_about(monkeypatch, caplog):
    module = build("resnet18", "c1")
    with pytest.raises(UserError, match=r"INFERENCE\.precision fp16"):
        prepare(module, precision="fp16")
    monkeypatch.setattr(inference, "cpu_has_bfloat16", lambda: False)
    prepare(module, precision="bf16")
    assert "INFERENCE.precision bf16" in caplog.text
    monkeypatch.setattr(inference, "lacks_bfloat16", lambda device: True)
    with pytest.raises(UserError, match=r"INFERENCE\.precision bf16: cuda:0"):
        inference.prepare(module, "cuda:0", InferenceOptions(precision="bf16"))


@pytest.mark.parametrize("pair", [("mobilenetv2dilated", "ppm_deepsup"), ("resnet18", "upernet"), ("hrnetv2", "c1")])
def test_prepared_network_has_the_same_probabilities(pair):
    """Logits are scaled to at most 10, as in trained networks; the float32 error is then at most 2e-5."""
    module = build(*pair)
    with torch.no_grad():
        last = [part for part in module.decoder.modules() if isinstance(part, torch.nn.Conv2d)][-1]
        scale = 10 / module.logits({"img_data": IMAGE}).abs().max()
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        ours, plain = (m({"img_data": IMAGE}, segSize=(64, 72)) for m in (prepare(module), module))
    assert (ours - plain).abs().max() < 2e-5


@pytest.mark.parametrize("old_switch", [True, False])
def test_strict_float32_changes_tf32_only_and_restores_it(old_switch, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    if old_switch or not hasattr(cudnn, "conv"):
        switch, name, values = cudnn, "allow_tf32", (True, False)
    else:
        switch, name, values = cudnn.conv, "fp32_precision", ("tf32", "ieee")
    before = getattr(switch, name)
    try:
        for value in values:
            setattr(switch, name, value)
            with inference._without_tf32():
                assert cudnn.benchmark
                assert not hasattr(cudnn, "conv") or cudnn.conv.fp32_precision == "ieee"
            assert getattr(switch, name) == value
    finally:
        setattr(switch, name, before)
