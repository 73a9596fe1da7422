"""Segmentation metrics, computed from pixel counts that can be summed over images and ranks."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

EPS = 1e-10  # added to denominators, as in version 2 of mit_semseg


class SegmentationMetric:
    """Confusion matrix of labels (rows) and predictions (columns), in pixels."""

    def __init__(self, num_class: int):
        self.num_class = num_class
        self.confusion = np.zeros((num_class, num_class), np.int64)

    def add(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Add the labelled pixels of an image to the confusion matrix.

        Args:
            prediction: (H, W) class indices.
            label: (H, W) class indices, negative where ignored.

        Raises:
            ValueError: the shapes differ, or a class index is outside 0..num_class - 1.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, but label has shape {label.shape}")
        if not label.size:
            return
        classes = self.num_class
        lowest, highest = prediction.min(), max(prediction.max(), label.max())
        if lowest < 0 or highest >= classes:
            name = "prediction" if lowest < 0 or prediction.max() >= classes else "label"
            value = lowest if lowest < 0 else highest
            raise ValueError(f"{name} contains class index {value}, but num_class {classes} allows 0 to {classes - 1}")
        tensors = (torch.from_numpy(np.asarray(x, np.int64)) for x in (prediction, label))
        self.add_counts(confusion_counts(*tensors, classes).numpy())

    def add_counts(self, counts: np.ndarray) -> None:
        """Add the result of `confusion_counts`; raise ValueError if it counts class indices outside the range."""
        for name, outside in (("prediction", counts[:, -1]), ("label", counts[-1])):
            if outside.any():
                raise ValueError(f"{name} contains class indices above {self.num_class - 1}, the last class")
        self.confusion += counts[:-1, :-1]

    def merge(self, other: "SegmentationMetric") -> None:
        """Add the counts of another metric, which must have the same number of classes."""
        if other.num_class != self.num_class:
            raise ValueError(f"cannot merge metrics with {other.num_class} and with {self.num_class} classes")
        self.confusion += other.confusion

    def summary(self) -> "Summary":
        """Return the metrics over all images added so far."""
        hits = np.diag(self.confusion)
        labelled, predicted = self.confusion.sum(1), self.confusion.sum(0)
        union = labelled + predicted - hits
        iou = hits / (union + EPS)
        present = labelled > 0
        return Summary(
            iou=iou,
            present=present,
            mean_iou=float(iou.mean()),
            mean_iou_present=float((hits[present] / union[present]).mean()) if present.any() else 0.0,
            pixel_accuracy=float(hits.sum() / max(labelled.sum(), 1)),
            mean_accuracy=float((hits[present] / labelled[present]).mean()) if present.any() else 0.0,
            pixels=int(labelled.sum()),
        )


def confusion_counts(prediction: Tensor, label: Tensor, num_class: int) -> Tensor:
    """Return the number of pixels per label (rows) and predicted class (columns), without waiting for the device.

    Args:
        prediction: (H, W) class indices, not negative.
        label: (H, W) int64 class indices, negative where ignored.

    Returns:
        (num_class + 1, num_class + 1) int64; the last row and column count indices of `num_class` and above.
    """
    # Count the pairs (label + 1, prediction). Row 0 counts ignored pixels.
    pairs = label.clamp(-1, num_class).add_(1).mul_(num_class + 1)
    pairs = pairs.add_(prediction.to(label.dtype).clamp(max=num_class)).flatten()
    length = (num_class + 2) * (num_class + 1)
    if label.device.type == "cpu":
        counts = torch.bincount(pairs, minlength=length)
    else:  # `bincount` reads the largest value from the device
        counts = pairs.new_zeros(length).scatter_add_(0, pairs, pairs.new_ones(()).expand_as(pairs))
    return counts.view(num_class + 2, num_class + 1)[1:]


@dataclass(frozen=True)
class Summary:
    """Metrics, all in 0..1 except `pixels`.

    Attributes:
        iou: (num_class,) intersection over union per class, 0 for a class in neither labels nor predictions.
        present: (num_class,) whether the labels contain the class.
        mean_iou: mean IoU over all classes; classes that are not in the labels are included with IoU 0.
        mean_iou_present: mean IoU over the classes in the labels.
        pixel_accuracy: fraction of the labelled pixels that are predicted correctly.
        mean_accuracy: accuracy (recall) per class, averaged over the classes in the labels.
        pixels: number of labelled pixels.
    """

    iou: np.ndarray
    present: np.ndarray
    mean_iou: float
    mean_iou_present: float
    pixel_accuracy: float
    mean_accuracy: float
    pixels: int

    @property
    def overall(self) -> float:
        """(mean IoU over all classes + pixel accuracy) / 2, as in the table of published results."""
        return (self.mean_iou + self.pixel_accuracy) / 2


@dataclass
class AverageMeter:
    """Weighted running average; fields are None before the first `update`."""

    val: float | None = None
    avg: float | None = None
    sum: float | None = None
    count: float | None = None
    initialized: bool = field(default=False, repr=False)

    def initialize(self, val, weight) -> None:
        self.val, self.avg, self.sum, self.count, self.initialized = val, val, val * weight, weight, True

    def update(self, val, weight=1) -> None:
        if not self.initialized:
            self.initialize(val, weight)
            return
        self.val, self.sum, self.count = val, self.sum + val * weight, self.count + weight
        self.avg = self.sum / self.count if self.count else val

    def add(self, val, weight=1) -> None:
        self.update(val, weight)

    def value(self):
        return self.val

    def average(self):
        return self.avg


def unique(ar, return_index: bool = False, return_inverse: bool = False, return_counts: bool = False):
    """Return `numpy.unique` of the flattened array."""
    return np.unique(np.asarray(ar).ravel(), return_index, return_inverse, return_counts)


def accuracy(preds: np.ndarray, label: np.ndarray) -> tuple[float, int]:
    """Return the fraction of correct pixels among labelled pixels (label >= 0), and the number of labelled pixels."""
    valid = label >= 0
    count = valid.sum()
    return float((valid & (preds == label)).sum()) / (count + EPS), count


def intersectionAndUnion(imPred: np.ndarray, imLab: np.ndarray, numClass: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of pixels in the intersection and in the union of every class, two (numClass,) int64 arrays.

    Pixels with a negative label, and class indices >= `numClass`, are ignored.
    """
    pred, label = np.asarray(imPred), np.asarray(imLab)
    valid = label >= 0
    pred, label = pred[valid], label[valid]

    def counts(values):
        return np.bincount(values[(values >= 0) & (values < numClass)].astype(np.int64), minlength=numClass)

    intersection = counts(pred[pred == label])
    return intersection, counts(pred) + counts(label) - intersection
