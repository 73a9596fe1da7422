"""Windows, mirroring and scales, against the plain computation over the whole picture."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import tiny_module

from mit_semseg.evaluation import inference, sliding_window
from mit_semseg.evaluation.inference import InferenceOptions, label_map, multi_scale_scores
from mit_semseg.evaluation.sliding_window import score_strips, window_starts
from mit_semseg.models import ModelBuilder, SegmentationModule

CLASSES = 4


class Local:
    """A network that sees `reach` pixels around each: a convolution of random weights, then softmax and resizing."""

    def __init__(self, reach=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        side = 2 * reach + 1
        self.weight = torch.randn(CLASSES, 3, side, side, generator=generator, dtype=torch.float64)
        self.reach, self.sizes = reach, []

    def __call__(self, feed, segSize):
        x = feed["img_data"]
        self.sizes.append(tuple(x.shape[-2:]))
        logits = F.conv2d(x, self.weight, padding=self.reach)
        return F.interpolate(logits, segSize, mode="bilinear", align_corners=False).softmax(1)


def picture(height, width, seed=0):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    window=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    overlap=st.floats(0, 0.9),
    flip=st.booleans(),
)
def test_windows_of_a_pointwise_network_are_the_whole_picture(size, window, overlap, flip):
    """What does not look around does not notice the windows, whatever their size and overlap."""
    model, x = Local(), picture(*size)
    expected = multi_scale_scores(model, [x], size, view=InferenceOptions(flip=flip))
    scores = multi_scale_scores(model, [x], size, view=InferenceOptions(flip, window, overlap))
    torch.testing.assert_close(scores, expected)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(1, 300), overlap=st.floats(0, 0.95))
def test_windows_cover_everything_with_their_overlap(length, window, overlap):
    window = min(window, length)
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    steps = np.diff(starts)
    assert all(1 <= step <= max(1, window * (1 - overlap)) for step in steps)


def test_interior_pixels_agree_with_the_whole_picture():
    """A network that sees 3 pixels around each gives the same where no window's border is that near."""
    model, x, reach = Local(reach=3), picture(60, 90), 3
    expected = multi_scale_scores(model, [x], (60, 90))
    scores = multi_scale_scores(model, [x], (60, 90), view=InferenceOptions(window=(24, 30), overlap=0.25))
    untouched = torch.ones(60, 90, dtype=torch.bool)
    for axis, window, length in ((0, 24, 60), (1, 30, 90)):
        for start in window_starts(length, window, 0.25):
            for border in (start, start + window):
                if 0 < border < length:
                    untouched.narrow(axis, border - reach, 2 * reach).fill_(False)
    assert 0.3 < untouched.float().mean() < 0.9
    torch.testing.assert_close(scores[:, untouched], expected[:, untouched])
    assert (scores - expected).abs().max() > 1e-3  # elsewhere the windows do show


def test_overlaps_are_averaged():
    """Brute force: every window's scores and a count per pixel."""
    model, x = Local(reach=2), picture(40, 33)
    height, width, overlap = 16, 20, 0.5
    total, count = torch.zeros(CLASSES, 40, 33, dtype=torch.float64), torch.zeros(40, 33)
    for top in window_starts(40, height, overlap):
        for left in window_starts(33, width, overlap):
            region = np.s_[..., top : top + height, left : left + width]
            total[region] += model({"img_data": x[region]}, segSize=(height, width))[0]
            count[region] += 1
    scores = multi_scale_scores(model, [x], (40, 33), view=InferenceOptions(window=(height, width), overlap=overlap))
    torch.testing.assert_close(scores, total / count)
    assert count.max() >= 4


@pytest.mark.parametrize("strip", [1, 7, 64])
def test_scales_and_mirroring_with_windows(strip, monkeypatch):
    """Every scale through its windows, resized to the picture, averaged: the same by whole tensors."""
    monkeypatch.setattr(sliding_window, "STRIP", strip)
    model, size = Local(reach=1), (37, 53)
    scales = [picture(*s) for s in ((24, 40), (37, 53), (80, 112))]
    view = InferenceOptions(flip=True, window=(20, 24), overlap=0.4)
    expected = 0
    for x in scales:
        own = multi_scale_scores(model, [x], tuple(x.shape[-2:]), view=view)
        expected = expected + F.interpolate(own[None], size, mode="bilinear", align_corners=False)[0] / len(scales)
    strips = list(score_strips(model, scales, size, "cpu", view))
    assert all(s.shape[1] <= strip for s in strips)
    torch.testing.assert_close(torch.cat(strips, 1), expected)
    item = {"img_ori": np.zeros((*size, 3), np.uint8), "img_data": scales}
    assert np.array_equal(label_map(model, item, view=view), expected.argmax(0).numpy())


@pytest.mark.parametrize("decoder", ["c1", "psp_bilinear"])
def test_label_maps_of_a_module_are_those_of_its_scores(decoder):
    """Without the scores at the picture's size, with and without aligned corners, scales and mirroring."""
    module = tiny_module().eval()
    module.decoder = ModelBuilder.build_decoder(decoder, num_class=CLASSES, in_channels=(8, 16)).eval()
    torch.nn.init.normal_(module.decoder.conv_last.weight if decoder == "c1" else module.decoder.conv_last[-1].weight)
    size = (45, 61)
    for scales in ([(48, 64)], [(32, 40), (48, 64), (72, 96)]):
        item = {"img_ori": np.zeros((*size, 3), np.uint8), "img_data": [picture(*s).float() for s in scales]}
        for view in (InferenceOptions(), InferenceOptions(flip=True)):
            labels = torch.from_numpy(label_map(module, item, view=view))
            scores = multi_scale_scores(module, item["img_data"], size, view=view)
            assert labels.unique().numel() > 1
            assert (scores.amax(0) - scores.gather(0, labels[None])[0]).max() < 1e-5


def test_mirroring_is_the_mean_of_both_views():
    model, x = Local(reach=2), picture(20, 31)
    flipped = multi_scale_scores(model, [x.flip(-1)], (20, 31)).flip(-1)
    expected = (multi_scale_scores(model, [x], (20, 31)) + flipped) / 2
    torch.testing.assert_close(multi_scale_scores(model, [x], (20, 31), view=InferenceOptions(flip=True)), expected)


def test_windows_bound_what_the_network_sees():
    model = Local(reach=1)
    item = {"img_ori": np.zeros((50, 70, 3), np.uint8), "img_data": [picture(50, 70), picture(20, 28)]}
    label_map(model, item, view=InferenceOptions(window=(32, 32)))
    assert set(model.sizes) == {(32, 32), (20, 28)}


def test_a_real_network_through_windows():
    module = tiny_module().double().eval()
    item = {"img_ori": np.zeros((45, 61, 3), np.uint8), "img_data": [picture(48, 64)]}
    assert label_map(module, item, view=InferenceOptions(flip=True, window=(32, 32))).shape == (45, 61)
    item["img_ori"] = np.zeros((48, 64, 3), np.uint8)  # a window as large as the picture changes nothing
    assert np.array_equal(
        label_map(module, item, view=InferenceOptions(flip=True, window=(48, 64))),
        label_map(module, item, view=InferenceOptions(flip=True)),
    )


@pytest.mark.parametrize("elements", [1, 2**24])
@pytest.mark.parametrize("decoder", ["c1", "psp"])
def test_windows_keep_logits_and_give_probabilities(decoder, elements, monkeypatch):
    """The same as from every window's whole probabilities, also with aligned corners."""
    monkeypatch.setattr(sliding_window, "ELEMENTS", elements)
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=4, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, dec, None).double().eval()
    x, view = picture(70, 90), InferenceOptions(window=(48, 40), overlap=0.3, flip=True)
    expected = multi_scale_scores(lambda feed, segSize: module(feed, segSize=segSize), [x], (60, 75), view=view)
    torch.testing.assert_close(multi_scale_scores(module, [x], (60, 75), view=view), expected)


@pytest.mark.parametrize("view", [InferenceOptions(), InferenceOptions(flip=True), InferenceOptions(window=(32, 32))])
def test_several_pictures_at_a_time_are_the_same(view, monkeypatch):
    """Pictures of one size in one batch, as on a GPU; others and windows one after the other."""
    module = tiny_module().double().eval()
    sizes = [(40, 56), (40, 56), (56, 40), (40, 56)]
    items = [
        {"img_ori": np.zeros((h, w, 3), np.uint8), "img_data": [picture(h, w, seed), picture(h // 2, w // 2, seed)]}
        for seed, (h, w) in enumerate(sizes)
    ]
    expected = [label_map(module, item, view=view) for item in items]
    seen, logits = [], SegmentationModule.logits
    monkeypatch.setattr(
        SegmentationModule, "logits", lambda self, x: seen.append(len(x["img_data"])) or logits(self, x)
    )
    monkeypatch.setattr(inference, "BATCHED", ("cpu",))
    for ours, one in zip(inference.label_maps(module, items, view=view), expected, strict=True):
        assert np.array_equal(ours, one)
    assert max(seen) == (1 if view.window else 2)
