"""Metrics, compared with golden values and brute-force computations."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mit_semseg.dataset import class_table
from mit_semseg.evaluation import SegmentationMetric
from mit_semseg.evaluation.metrics import confusion_counts
from mit_semseg.utils import AverageMeter, accuracy, colorEncode, intersectionAndUnion, parse_devices

UTILS = golden("golden_utils")


def drawn(case):
    rng = np.random.default_rng(case["seed"])
    shape = tuple(case["hw"])
    pred, label = rng.integers(0, case["phi"], shape), rng.integers(-1, case["lhi"], shape)
    if case["note"] == "pred 70% right":
        keep = rng.random(shape) < 0.7
        pred = np.where(keep & (label >= 0), label, pred)
    return pred, label


@pytest.mark.parametrize("case", UTILS["accuracy"], ids=lambda c: str(c["seed"]))
def test_accuracy(case):
    acc, valid = accuracy(*drawn(case))
    assert acc == pytest.approx(case["acc"], rel=1e-12)
    assert valid == case["valid"]


@pytest.mark.parametrize("case", UTILS["intersectionAndUnion"], ids=lambda c: str(c["seed"]))
def test_intersection_and_union(case):
    intersection, union = intersectionAndUnion(*drawn(case), case["numClass"])
    assert intersection.tolist() == case["intersection"]
    assert union.tolist() == case["union"]


@pytest.mark.parametrize("case", UTILS["colorEncode"], ids=lambda c: str(c["seed"]))
def test_color_encode(case):
    label = np.random.default_rng(case["seed"]).integers(case["lo"], case["hi"], tuple(case["hw"]))
    colors = colorEncode(label.astype(case["dtype"]), class_table("ade20k").colors, mode=case["mode"])
    assert list(colors.shape) == case["shape"]
    assert colors.dtype == case["out_dtype"]
    assert int(colors.sum()) == case["sum"]
    assert colors.reshape(-1)[case["idx"]].tolist() == case["values"]


def test_color_encode_refuses_a_class_without_color():
    with pytest.raises(IndexError, match=r"class.* 150"):
        colorEncode(np.full((2, 2), 150), class_table("ade20k").colors)


@pytest.mark.parametrize(("given", "expected"), UTILS["parse_devices"], ids=lambda v: json.dumps(v)[:20])
def test_parse_devices(given, expected):
    if given == "cpu":  # the original code refuses cpu
        assert parse_devices(given) == ["cpu"]
    elif isinstance(expected, str):
        with pytest.raises(ValueError, match="Can not recognize device"):
            parse_devices(given)
    else:
        assert parse_devices(given) == expected


@pytest.mark.parametrize("case", UTILS["AverageMeter"], ids=lambda c: str(c["updates"])[:20])
def test_average_meter(case):
    meter = AverageMeter()
    assert [meter.val, meter.avg, meter.sum, meter.count] == UTILS["AverageMeter_empty"]
    for (value, weight), expected in zip(case["updates"], case["states_val_avg_sum_count"], strict=True):
        value = np.array(value) if isinstance(value, list) else value
        meter.update(value, weight)
        if isinstance(expected, str):  # the original code divided by zero
            assert meter.average() == value
            continue
        for ours, theirs in zip((meter.val, meter.avg, meter.sum, meter.count), expected, strict=True):
            assert np.asarray(ours).tolist() == theirs
        assert meter.value() is meter.val


def test_average_meter_of_integer_and_float_arrays():
    meter = AverageMeter()
    meter.update(np.array([1, 2]))
    meter.update(np.array([0.5, 0.25]))
    assert meter.average().tolist() == [0.75, 1.125]


MAPS = arrays.arrays(np.int64, (5, 7), elements=st.integers(-1, 3))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(MAPS, MAPS), min_size=1, max_size=3))
def test_summary_equals_its_definition(images):
    """Compare with brute force over all pixels, and merge the metrics of single images."""
    whole, parts = SegmentationMetric(4), []
    for pred, label in images:
        pred = np.maximum(pred, 0)
        part = SegmentationMetric(4)
        whole.add(pred, label)
        part.add(pred, label)
        parts.append(part)
    merged = SegmentationMetric(4)
    for part in parts:
        merged.merge(part)
    assert np.array_equal(merged.confusion, whole.confusion)
    pred = np.concatenate([np.maximum(p, 0).ravel() for p, _ in images])
    label = np.concatenate([v.ravel() for _, v in images])
    pred, label = pred[label >= 0], label[label >= 0]
    iou = [((pred == c) & (label == c)).sum() / max(1, ((pred == c) | (label == c)).sum()) for c in range(4)]
    recall = [((pred == c) & (label == c)).sum() / (label == c).sum() for c in range(4) if (label == c).any()]
    present = [iou[c] for c in range(4) if (label == c).any()]
    summary = whole.summary()
    assert summary.iou == pytest.approx(iou, abs=1e-9)
    assert summary.mean_iou == pytest.approx(np.mean(iou), abs=1e-9)
    assert summary.mean_iou_present == pytest.approx(np.mean(present) if present else 0, abs=1e-9)
    assert summary.pixel_accuracy == pytest.approx((pred == label).mean() if len(label) else 0)
    assert summary.mean_accuracy == pytest.approx(np.mean(recall) if recall else 0)
    assert summary.overall == pytest.approx((summary.mean_iou + summary.pixel_accuracy) / 2)
    assert summary.pixels == len(label)


def test_class_outside_the_range_is_refused():
    metric = SegmentationMetric(3)
    with pytest.raises(ValueError, match=r"label .*3"):
        metric.add(np.zeros((2, 2), int), np.full((2, 2), 3))
    with pytest.raises(ValueError, match=r"prediction .*7"):
        metric.add(np.full((2, 2), 7), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="shape"):
        metric.add(np.zeros((2, 2), int), np.zeros((2, 3), int))
    for prediction, label, name in ((3, 0, "prediction"), (0, 3, "label"), (255, -1, "ignored")):
        counts = confusion_counts(torch.tensor([[prediction]]), torch.tensor([[label]]), 3)
        with nullcontext() if name == "ignored" else pytest.raises(ValueError, match=name):
            metric.add_counts(counts.numpy())
    assert metric.confusion.sum() == 0
