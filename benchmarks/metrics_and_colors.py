"""What do counting a picture's scores and colouring its label map cost, next to the plain ways?

    python benchmarks/metrics_and_colors.py [--json FILE]

150 classes, a 512x683 picture. Scores: one count of pairs against two histograms (of the hits, and of both maps), as
scripts often have it. Colours: a table lookup against a loop over the classes that are there. Both ways take turns.
"""

from functools import partial

import numpy as np
import torch
from common import interleaved, parser_of, write
from PIL import Image

from mit_semseg.evaluation import SegmentationMetric
from mit_semseg.predict.visualize import colorEncode

CLASSES, SIZE = 150, (512, 683)


def one_count(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    metric = SegmentationMetric(CLASSES)
    metric.add(prediction, label)
    summary = metric.summary()
    return summary.iou


def histograms(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Intersections and unions, (2, CLASSES)."""
    prediction, label = prediction + 1, label + 1
    prediction = prediction * (label > 0)
    hits = prediction * (prediction == label)
    bins = {"bins": CLASSES, "range": (1, CLASSES)}
    intersection = np.histogram(hits, **bins)[0]
    union = np.histogram(prediction, **bins)[0] + np.histogram(label, **bins)[0] - intersection
    return np.stack([intersection, union])


def two_histograms(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    intersection, union = histograms(prediction, label)
    return intersection / (union + 1e-10)


def class_by_class(label_map: np.ndarray, colors: np.ndarray) -> np.ndarray:
    picture = np.zeros((*label_map.shape, 3), np.uint8)
    for number in np.unique(label_map):
        if number >= 0:
            picture += (label_map == number)[..., None].astype(np.uint8) * colors[number]
    return picture


def label_maps(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and label: noise, or regions as a picture has them."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, CLASSES, SIZE), rng.integers(-1, CLASSES, SIZE)
    regions = Image.fromarray(rng.integers(0, CLASSES, (6, 8)).astype(np.uint8))
    label = np.asarray(regions.resize(SIZE[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    return np.where(rng.random(SIZE) < 0.2, rng.integers(0, CLASSES, SIZE), label), label


def main() -> None:
    args = parser_of(__doc__, repeats=15, device=False, threads=None).parse_args()
    colors = np.random.default_rng(1).integers(0, 256, (CLASSES, 3)).astype(np.uint8)
    device, rows = torch.device("cpu"), []
    for kind in ("noise", "regions"):
        prediction, label = label_maps(kind)
        np.testing.assert_allclose(one_count(prediction, label), two_histograms(prediction, label), atol=1e-9)
        np.testing.assert_array_equal(colorEncode(label, colors), class_by_class(label, colors))
        for what, ways in {
            "scores": {
                "plain": partial(two_histograms, prediction, label),
                "ours": partial(one_count, prediction, label),
            },
            "colours": {"plain": partial(class_by_class, label, colors), "ours": partial(colorEncode, label, colors)},
        }.items():
            ms = interleaved(ways, device, args.repeats)
            times = {f"{name} ms": value for name, value in ms.items()}
            rows.append({"what": f"{what}, {kind}", **times, "times faster": ms["plain"] / ms["ours"]})
    write(args.json, f"metrics_and_colors, {CLASSES} classes, {SIZE[0]}x{SIZE[1]}", device, rows)


if __name__ == "__main__":
    main()
