"""Measure the time to compute the IoU and the class colors of one label map.

    python benchmarks/metrics_and_colors.py [--json FILE]

The label map has 150 classes and 512x683 pixels. It has a random class at every pixel, or large regions of one class.

- IoU: the baseline computes three histograms (intersection, prediction, label), ours computes a confusion matrix.
- Colors: the baseline loops over the classes in the label map, ours looks up the color of every pixel.
"""

from functools import partial

import numpy as np
import torch
from common import interleaved, parser_of, write
from PIL import Image

from mit_semseg.evaluation import SegmentationMetric
from mit_semseg.predict.visualize import colorEncode

CLASSES, SIZE = 150, (512, 683)
KINDS = {"random": "random label map", "regions": "label map with large regions"}


def iou_by_confusion(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    metric = SegmentationMetric(CLASSES)
    metric.add(prediction, label)
    return metric.summary().iou


def histograms(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the number of pixels in the intersection and union of every class, (2, CLASSES)."""
    prediction, label = prediction + 1, label + 1
    prediction = prediction * (label > 0)
    hits = prediction * (prediction == label)
    bins = {"bins": CLASSES, "range": (1, CLASSES)}
    intersection = np.histogram(hits, **bins)[0]
    union = np.histogram(prediction, **bins)[0] + np.histogram(label, **bins)[0] - intersection
    return np.stack([intersection, union])


def iou_by_histograms(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    intersection, union = histograms(prediction, label)
    return intersection / (union + 1e-10)


def color_by_class(label_map: np.ndarray, colors: np.ndarray) -> np.ndarray:
    image = np.zeros((*label_map.shape, 3), np.uint8)
    for index in np.unique(label_map):
        if index >= 0:
            image += (label_map == index)[..., None].astype(np.uint8) * colors[index]
    return image


def label_maps(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a prediction and a label, both (H, W); `kind` is a key of `KINDS`."""
    rng = np.random.default_rng(0)
    if kind == "random":
        return rng.integers(0, CLASSES, SIZE), rng.integers(-1, CLASSES, SIZE)
    regions = Image.fromarray(rng.integers(0, CLASSES, (6, 8)).astype(np.uint8))
    label = np.asarray(regions.resize(SIZE[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    return np.where(rng.random(SIZE) < 0.2, rng.integers(0, CLASSES, SIZE), label), label


def main() -> None:
    args = parser_of(__doc__, repeats=15, device=False, threads=None).parse_args()
    colors = np.random.default_rng(1).integers(0, 256, (CLASSES, 3)).astype(np.uint8)
    device, rows = torch.device("cpu"), []
    for kind, description in KINDS.items():
        prediction, label = label_maps(kind)
        np.testing.assert_allclose(iou_by_confusion(prediction, label), iou_by_histograms(prediction, label), atol=1e-9)
        np.testing.assert_array_equal(colorEncode(label, colors), color_by_class(label, colors))
        for topic, functions in {
            "IoU": {
                "baseline": partial(iou_by_histograms, prediction, label),
                "ours": partial(iou_by_confusion, prediction, label),
            },
            "colors": {"baseline": partial(color_by_class, label, colors), "ours": partial(colorEncode, label, colors)},
        }.items():
            ms = interleaved(functions, device, args.repeats)
            times = {f"{name} ms": value for name, value in ms.items()}
            rows.append({"case": f"{topic}, {description}", **times, "times faster": ms["baseline"] / ms["ours"]})
    write(args.json, f"metrics_and_colors, {CLASSES} classes, {SIZE[0]}x{SIZE[1]}", device, rows)


if __name__ == "__main__":
    main()
