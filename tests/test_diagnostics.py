"""Boundary IoU, calibration, temperature and label quality, compared with direct computations."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import options, tiny_module, write_data_set, write_pairs
from scipy.ndimage import binary_erosion
from scipy.special import softmax

from mit_semseg.dataset import ValDataset
from mit_semseg.evaluation import InferenceOptions, Predictor, boundary, evaluate
from mit_semseg.evaluation.boundary import boundary_counts, boundary_iou
from mit_semseg.evaluation.calibration import BINS, Reliability, calibration_counts
from mit_semseg.evaluation.evaluator import Evaluation, LoadOptions
from mit_semseg.evaluation.label_map import sample_positions
from mit_semseg.evaluation.label_quality import label_probability, label_quality
from mit_semseg.evaluation.temperature import fit_temperature

LOADING = LoadOptions(workers=0)


def blobs(rng, size, classes):
    """Return a label map (H, W) int64 that consists of random rectangles."""
    small = rng.integers(0, classes, [max(1, side // 12) for side in size]).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)


def counts_by_erosion(prediction, label, classes):
    """Return `boundary_counts` by the definition of the paper: the pixels of a mask that erosion removes."""
    width = max(1, round(0.02 * np.hypot(*label.shape)))
    valid, counts = label >= 0, np.zeros((3, classes), np.int64)
    for index in range(classes):
        masks = [(labels == index) & valid for labels in (label, prediction)]
        regions = [m & ~binary_erosion(m | ~valid, np.ones((3, 3)), iterations=width) for m in masks]
        counts[:, index] = [np.sum(region) for region in (*regions, regions[0] & regions[1])]
    return counts


@pytest.mark.parametrize("implementation", ["opencv", "pooling"])
def test_boundary_counts_equal_erosion(implementation, monkeypatch):
    function = getattr(boundary, f"_window_range_{implementation}")
    monkeypatch.setattr(boundary, "_window_range_opencv", function)
    rng = np.random.default_rng(0)
    for case in range(40):
        size, classes = tuple(rng.integers(1, 90, 2)), int(rng.integers(2, 6))
        label, prediction = blobs(rng, size, classes), blobs(rng, size, classes)
        if case % 2:
            prediction = np.where(rng.random(size) < 0.9, label, prediction)
        if case % 3:
            label[blobs(rng, size, 3) == 0] = -1
        counts = boundary_counts(torch.from_numpy(prediction).to(torch.uint8), torch.from_numpy(label), classes)
        np.testing.assert_array_equal(counts.numpy(), counts_by_erosion(prediction, label, classes))


def test_boundary_iou_is_one_for_equal_maps_and_less_for_a_shifted_map():
    label = torch.zeros(100, 100, dtype=torch.int64)
    label[30:70, 30:70] = 1
    label[:, :5] = -1
    equal = boundary_iou(boundary_counts(label.clamp(min=0), label, 3).numpy())
    np.testing.assert_array_equal(equal, [1, 1, np.nan])
    shifted = boundary_iou(boundary_counts(label.clamp(min=0).roll(2, 0), label, 3).numpy())
    assert 0 < shifted[1] < 0.6


def random_probabilities(rng, classes, size, sharpness):
    return torch.from_numpy(softmax(rng.normal(size=(classes, *size)) * sharpness, axis=0).astype(np.float32))


def test_calibration_error_equals_a_direct_computation():
    rng = np.random.default_rng(0)
    probabilities = random_probabilities(rng, 4, (50, 60), 3)
    label = torch.from_numpy(rng.integers(-1, 4, (50, 60)))
    result = Reliability.from_counts(calibration_counts(probabilities, label).numpy())
    valid = label.numpy() >= 0
    confidence, predicted = (x.numpy()[valid].astype(np.float64) for x in probabilities.max(0))
    correct = predicted == label.numpy()[valid]
    edges, expected = np.linspace(0, 1, BINS + 1), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert result.error == pytest.approx(expected, abs=1e-6)
    assert result.pixels.sum() == valid.sum()


def test_perfectly_calibrated_predictions_have_a_small_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000).astype(np.float32)
    probabilities = torch.from_numpy(np.stack([confidence, 1 - confidence]))[:, None]
    label = torch.from_numpy((rng.random(len(confidence)) >= confidence).astype(np.int64))[None]
    assert Reliability.from_counts(calibration_counts(probabilities, label).numpy()).error < 0.01


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_fit_finds_the_temperature_of_sampled_labels(temperature, scales):
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(5, 40_000)) * 4 for _ in range(scales)]
    probabilities = np.mean([softmax(x / temperature, axis=0) for x in logits], axis=0)
    label = (rng.random(40_000) < probabilities.cumsum(0)).argmax(0)
    result = fit_temperature([torch.from_numpy(x.astype(np.float32)) for x in logits], torch.from_numpy(label))
    assert result.value == pytest.approx(temperature, rel=0.04)
    assert result.nll[1] <= result.nll[0] + 1e-6
    assert result.error[1] < 0.02


def test_label_quality_is_the_soft_minimum_of_the_paper():
    rng = np.random.default_rng(0)
    probabilities, label = random_probabilities(rng, 3, (8, 9), 2), torch.from_numpy(rng.integers(-1, 3, (8, 9)))
    given = label_probability(probabilities, label)
    values = np.array([probabilities[c, y, x] for (y, x), c in np.ndenumerate(label.numpy()) if c >= 0], np.float64)
    weights = softmax((1 - values) / 0.1)
    assert float(label_quality(given)) == pytest.approx(float(weights @ values), rel=1e-5)
    assert label_quality(torch.full((2, 2), torch.nan)).isnan()


class ColorNetwork:
    """Predicts the class whose mean color in `scenes.write_pairs` is the nearest, with strided logits."""

    align_corners = False

    def logits(self, batch):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = 255 * (batch["img_data"][0].permute(1, 2, 0) * std + mean) - 30
        colors = torch.tensor([[60.0, 40, 20]]) * torch.arange(1, 4)[:, None] % 190
        distance = (pixels[None] - colors[:, None, None]).norm(dim=-1)
        return torch.nn.functional.avg_pool2d(-distance / 12, 4)[None]


def test_spoiled_labels_have_the_lowest_quality(tmp_path):
    write_pairs(tmp_path / "val", [(80, 64)] * 40, values=(1, 2, 3))
    spoiled = {"val/images/07.png", "val/images/23.png"}
    for name in spoiled:
        path = tmp_path / name.replace("images", "annotations")
        label = np.array(Image.open(path))
        block = label[:16, :20]
        block[:] = block % 3 + 1  # another class in one of the 16 blocks
        Image.fromarray(label).save(path)
    result = evaluate(
        Predictor(ColorNetwork()), ValDataset(tmp_path, "val", options(imgSizes=64)), loading=LOADING, diagnostics=True
    )
    ranked = [row["image"] for row in result.as_dict()["per_image"]]
    assert set(ranked[:2]) == spoiled
    assert [entry.name for entry in result.diagnostics.doubtful] == ranked[:12]
    doubt = result.diagnostics.doubtful[0].given
    assert np.nanmean(doubt[:4, :5]) < 0.1 < 0.8 < np.nanmean(doubt[4:, 5:])


def test_image_without_labelled_samples_has_no_quality(tmp_path):
    write_pairs(tmp_path / "val", [(40, 40)] * 2, values=(1, 2, 3))
    sparse = np.zeros((40, 40), np.uint8)
    sparse[0, 0] = 1  # not at a sampled position
    Image.fromarray(sparse).save(tmp_path / "val/annotations/00.png")
    result = evaluate(
        Predictor(ColorNetwork()), ValDataset(tmp_path, "val", options(imgSizes=40)), loading=LOADING, diagnostics=True
    )
    rows = json.loads(json.dumps(result.as_dict(), allow_nan=False))["per_image"]
    assert [row["image"] for row in rows] == ["val/images/01.png", "val/images/00.png"]
    assert rows[1]["label_quality"] is None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_diagnostics_equal_those_of_all_probabilities(root, window):
    dataset, inference = ValDataset(root, "val", options()), InferenceOptions(window_size=window, flip=True)
    predictor = Predictor(tiny_module(), "cpu", inference)
    predictor.temperature = 0.7
    result = evaluate(predictor, dataset, loading=LOADING, diagnostics=True).diagnostics
    calibration, border = np.zeros((3, BINS), np.int64), np.zeros((3, 3), np.int64)
    qualities = {}
    for index, record in enumerate(dataset.records):
        item = dataset[index]
        label, size = item["seg_label"][0], tuple(item["img_ori"].shape[:2])
        rows, columns = sample_positions(size)
        probabilities = predictor.probabilities(item["img_data"], size)[:, rows][..., columns]
        sampled = label[rows][:, columns]
        calibration += calibration_counts(probabilities, sampled).numpy()
        border += counts_by_erosion(predictor.label_map(item).numpy(), label.numpy(), 3)
        qualities[record["fpath_img"]] = float(label_quality(label_probability(probabilities, sampled)))
    np.testing.assert_array_equal(result.boundary, border)
    np.testing.assert_array_equal(result.calibration[:2], calibration[:2])
    np.testing.assert_allclose(result.calibration[2], calibration[2], rtol=1e-6)
    assert {entry.name: entry.quality for entry in result.doubtful} == pytest.approx(qualities, rel=1e-4)


def test_diagnostics_do_not_depend_on_shards(root):
    dataset, predictor = ValDataset(root, "val", options()), Predictor(tiny_module())
    whole = evaluate(predictor, dataset, loading=LOADING, diagnostics=True)
    shards = [evaluate(predictor, dataset.shard(i, 2), loading=LOADING, diagnostics=True) for i in range(2)]
    merged = Evaluation.merge(shards)
    unequal = ("seconds", "images_per_second")
    texts = [
        json.dumps({key: value for key, value in result.as_dict().items() if key not in unequal})
        for result in (whole, merged)
    ]
    assert texts[0] == texts[1]


def test_temperature_changes_probabilities_but_not_the_label_map_of_one_scale(root):
    item = ValDataset(root, "val", options(imgSizes=48))[0]
    predictor, scaled = Predictor(tiny_module()), Predictor(tiny_module())
    scaled.temperature = 3.0
    (first,), (second,) = (p.predict([item], confidence=True, samples=True) for p in (predictor, scaled))
    assert torch.equal(first.label_map, second.label_map)
    assert second.confidence.mean() < first.confidence.mean()
    expected = torch.stack([x / 3 for x in predictor.logits(item)])
    size = item["img_ori"].shape[:2]
    expected = torch.nn.functional.interpolate(expected, size, mode="bilinear").softmax(1)[0]
    torch.testing.assert_close(second.confidence, expected.amax(0))
    rows, columns = sample_positions(size)
    torch.testing.assert_close(second.samples, expected[:, rows][..., columns])
