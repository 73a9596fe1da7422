"""Label maps from logits equal the argmax of resized scores, unless two scores differ by a rounding error."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mit_semseg.evaluation.label_map import label_map_from_logits, probability_strips

KINDS = ("noise", "trained", "nearly one-hot", "far apart")


def reference_scores(logits, size, align_corners=False):
    """Return the resized logits (C, H, W) of one scale, or the mean softmax of several scales."""
    resized = [F.interpolate(x[None], size, mode="bilinear", align_corners=align_corners)[0] for x in logits]
    return sum(x.softmax(0) for x in resized) / len(resized) if len(logits) > 1 else resized[0]


def logits_of(kind, classes, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randn(classes, height, width, generator=generator)
    coarse = torch.randn(1, classes, max(1, height // 4), max(1, width // 4), generator=generator)
    scale = {"trained": 8, "nearly one-hot": 30, "far apart": 300}[kind]
    return F.interpolate(coarse * scale, (height, width), mode="bicubic")[0]


def assert_best(labels, scores):
    """Check that every label is the class with the largest score, except for rounding errors."""
    best = scores.amax(0)
    chosen = scores.gather(0, labels[None].long())[0]
    assert labels.shape == best.shape
    assert labels.dtype == (torch.uint8 if len(scores) <= 256 else torch.int16)
    assert ((best - chosen) <= 1e-5 * best.abs().clamp(min=1)).all()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_label_map_is_the_class_with_the_best_score(kind, views, align_corners):
    size = (61, 83)
    logits = [logits_of(kind, 20, 8 + 3 * i, 11 + 2 * i, seed=i) for i in range(views)]
    expected = reference_scores(logits, size, align_corners)
    assert_best(label_map_from_logits(logits, size, align_corners=align_corners), expected)
    strips = probability_strips(logits, size, align_corners=align_corners, exact=views > 1)
    torch.testing.assert_close(torch.cat(list(strips), 1), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(
    classes=st.integers(1, 12),
    source=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    align_corners=st.booleans(),
    double=st.booleans(),
)
def test_label_map_for_any_size(classes, source, size, align_corners, double):
    logits = [logits_of("noise", classes, *s, seed=i) for i, s in enumerate(source)]
    logits = [x.double() if double else x for x in logits]
    labels = label_map_from_logits(logits, size, align_corners=align_corners)
    assert_best(labels, reference_scores(logits, size, align_corners))


@pytest.mark.parametrize("elements", [1, 500, 2**21])
def test_strip_size_does_not_change_the_probabilities(elements, monkeypatch):
    logits = [logits_of("trained", 7, 9, 12, seed=i) for i in range(2)]
    whole = torch.cat(list(probability_strips(logits, (40, 50))), 1)
    monkeypatch.setattr("mit_semseg.evaluation.label_map.CPU_STRIP_ELEMENTS", elements)
    torch.testing.assert_close(torch.cat(list(probability_strips(logits, (40, 50))), 1), whole)


@pytest.mark.parametrize("classes", [2, 255, 256, 257, 1000])
def test_label_map_with_many_classes(classes):
    """uint8 cannot store the indices of more than 256 classes."""
    logits = logits_of("noise", classes, 6, 7)
    logits[-1] += 0.5
    labels = label_map_from_logits([logits], (20, 30))
    assert_best(labels, reference_scores([logits], (20, 30)))
    assert (labels == classes - 1).any()


@pytest.mark.parametrize("views", [1, 2])
def test_first_of_equal_classes_wins(views):
    assert (label_map_from_logits([torch.zeros(5, 3, 4)] * views, (9, 9)) == 0).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_label_map_from_16_bit_logits(kind):
    logits = logits_of("trained", 9, 8, 8).to(kind)
    assert_best(label_map_from_logits([logits], (30, 30)), reference_scores([logits.float()], (30, 30)))
