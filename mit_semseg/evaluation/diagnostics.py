"""Statistics of `eval.py` beyond the confusion matrix: boundaries, calibration and the labels that look wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .boundary import boundary_counts, boundary_iou
from .calibration import BINS, Reliability, calibration_counts
from .inference import Prediction
from .label_map import sample_positions
from .label_quality import label_probability, label_quality

MAX_DOUBTFUL = 12  # number of images whose labels look wrong that are kept for the report


@dataclass(frozen=True)
class DoubtfulLabel:
    """An image whose label looks wrong.

    Attributes:
        name: path of the image, as in the list.
        quality: label quality, see `label_quality`.
        label_map: (H, W) predicted class indices.
        given: (h, w) float32 probability of the label at the `sample_positions`, NaN where the label is ignored.
    """

    name: str
    quality: float
    label_map: np.ndarray = field(repr=False)
    given: np.ndarray = field(repr=False)


class Diagnostics:
    """Boundary IoU, calibration and doubtful labels of a validation set.

    Attributes:
        boundary: (3, num_class) sum of `boundary_counts`.
        calibration: (3, BINS) sum of `calibration_counts`.
        doubtful: the `MAX_DOUBTFUL` images with the lowest label quality, in ascending order.
    """

    def __init__(self, num_class: int):
        self.boundary = np.zeros((3, num_class), np.int64)
        self.calibration = np.zeros((3, BINS), np.int64)
        self.doubtful: list[DoubtfulLabel] = []

    @staticmethod
    @torch.inference_mode()
    def measure(prediction: Prediction, label: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that `add` needs, on the device. `prediction` has samples; `label`: (H, W) int64."""
        rows, columns = sample_positions(tuple(label.shape))
        sampled = label[rows.start :: rows.step, columns.start :: columns.step]
        given = label_probability(prediction.samples, sampled)
        counts = boundary_counts(prediction.label_map, label, len(prediction.samples))
        return counts, calibration_counts(prediction.samples, sampled), label_quality(given), given

    def add(self, name: str, label_map: np.ndarray, measured: Sequence[Tensor]) -> float:
        """Add the result of `measure` for an image, on the CPU; return the label quality."""
        boundary, calibration, quality, given = measured
        self.boundary += boundary.numpy()
        self.calibration += calibration.numpy()
        if not quality.isnan():
            self._keep_worst([DoubtfulLabel(name, float(quality), label_map, given.numpy())])
        return float(quality)

    def merge(self, other: "Diagnostics") -> None:
        """Add the statistics of another shard."""
        self.boundary += other.boundary
        self.calibration += other.calibration
        self._keep_worst(other.doubtful)

    def _keep_worst(self, entries: Sequence[DoubtfulLabel]) -> None:
        self.doubtful = sorted([*self.doubtful, *entries], key=lambda entry: (entry.quality, entry.name))[:MAX_DOUBTFUL]

    @property
    def boundary_iou(self) -> np.ndarray:
        """Boundary IoU (num_class,), NaN for a class without boundary pixels in labels and predictions."""
        return boundary_iou(self.boundary)

    @property
    def mean_boundary_iou(self) -> float:
        """Mean boundary IoU over the classes in the labels; 0 without labels."""
        present = self.boundary[0] > 0
        return float(self.boundary_iou[present].mean()) if present.any() else 0.0

    @property
    def reliability(self) -> Reliability:
        return Reliability.from_counts(self.calibration)
