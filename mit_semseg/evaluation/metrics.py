"""Scores of label maps, all from counts that add up over images and processes."""

from dataclasses import dataclass, field

import numpy as np

EPS = 1e-10  # the original divides by union + EPS


class SegmentationMetric:
    """Confusion counts of predicted and annotated pixels.

    Args:
        num_class: number of classes.
    """

    def __init__(self, num_class: int):
        self.num_class = num_class
        self.confusion = np.zeros((num_class, num_class), np.int64)  # [annotated, predicted]

    def add(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Count the labelled pixels of a picture.

        Args:
            prediction: (H, W) class indices.
            label: (H, W) class indices, negative where ignored.

        Raises:
            ValueError: different shapes, or a class outside 0..num_class - 1.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
        if not label.size:
            return
        classes = self.num_class
        lowest, highest = prediction.min(), max(prediction.max(), label.max())
        if lowest < 0 or highest >= classes:
            name = "prediction" if lowest < 0 or prediction.max() >= classes else "label"
            raise ValueError(
                f"{name} holds class {lowest if lowest < 0 else highest}, but there are only {classes} classes (0 to "
                f"{classes - 1})"
            )
        # One pass over the pairs; the first row counts what is ignored.
        pairs = np.maximum(label, -1, dtype=np.int64)
        pairs += 1
        pairs *= classes
        pairs += prediction
        counts = np.bincount(pairs.ravel(), minlength=(classes + 1) * classes)
        self.confusion += counts.reshape(classes + 1, classes)[1:]

    def merge(self, other: "SegmentationMetric") -> None:
        """Add the counts of another metric of the same classes."""
        if other.num_class != self.num_class:
            raise ValueError(f"cannot merge counts of {other.num_class} and {self.num_class} classes")
        self.confusion += other.confusion

    def summary(self) -> "Summary":
        """The scores of everything counted so far."""
        hits = np.diag(self.confusion)
        annotated, predicted = self.confusion.sum(1), self.confusion.sum(0)
        union = annotated + predicted - hits
        iou = hits / (union + EPS)
        present = annotated > 0
        return Summary(
            iou=iou,
            present=present,
            mean_iou=float(iou.mean()),
            mean_iou_present=float((hits[present] / union[present]).mean()) if present.any() else 0.0,
            pixel_accuracy=float(hits.sum() / max(annotated.sum(), 1)),
            mean_accuracy=float((hits[present] / annotated[present]).mean()) if present.any() else 0.0,
            pixels=int(annotated.sum()),
        )


@dataclass(frozen=True)
class Summary:
    """Scores, all in 0..1.

    Attributes:
        iou: (num_class,) intersection over union of each class; 0 for a class that neither labels nor predictions have.
        present: (num_class,) whether at least one pixel is labelled with the class.
        mean_iou: mean of `iou` over all classes, the original's definition: a class absent from the data counts as 0.
        mean_iou_present: mean over the classes present in the labels.
        pixel_accuracy: share of labelled pixels that are right.
        mean_accuracy: mean over the present classes of the share of their pixels that are right.
        pixels: labelled pixels counted.
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
        """Mean of mean IoU and pixel accuracy: the third figure of the published table."""
        return (self.mean_iou + self.pixel_accuracy) / 2


@dataclass
class AverageMeter:
    """Weighted running average; all fields None before the first `update`."""

    val: float | None = None
    avg: float | None = None
    sum: float | None = None
    count: float | None = None
    initialized: bool = field(default=False, repr=False)

    def initialize(self, val, weight) -> None:
        """Start from one value."""
        self.val, self.avg, self.sum, self.count, self.initialized = val, val, val * weight, weight, True

    def update(self, val, weight=1) -> None:
        """Take in a value with a weight."""
        if not self.initialized:
            self.initialize(val, weight)
            return
        self.val, self.sum, self.count = val, self.sum + val * weight, self.count + weight
        self.avg = self.sum / self.count if self.count else val

    def add(self, val, weight=1) -> None:
        """Same as `update`."""
        self.update(val, weight)

    def value(self):
        """The last value."""
        return self.val

    def average(self):
        """The weighted average."""
        return self.avg


def unique(ar, return_index: bool = False, return_inverse: bool = False, return_counts: bool = False):
    """`numpy.unique` of the flattened array."""
    return np.unique(np.asarray(ar).ravel(), return_index, return_inverse, return_counts)


def accuracy(preds: np.ndarray, label: np.ndarray) -> tuple[float, int]:
    """Share of right pixels among the labelled (label >= 0) ones, and how many those are.

    Args:
        preds, label: class indices of equal shape.
    """
    valid = label >= 0
    count = valid.sum()
    return float((valid & (preds == label)).sum()) / (count + EPS), count


def intersectionAndUnion(imPred: np.ndarray, imLab: np.ndarray, numClass: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the intersection and of the union of prediction and label, per class.

    Unlabelled pixels (negative label) are left out; so are values of `numClass` and above (`SegmentationMetric` refuses
    them).

    Args:
        imPred, imLab: class indices of equal shape.
        numClass: number of classes.

    Returns:
        Two (numClass,) int64 arrays.
    """
    pred, label = np.asarray(imPred), np.asarray(imLab)
    valid = label >= 0
    pred, label = pred[valid], label[valid]

    def counts(values):
        return np.bincount(values[(values >= 0) & (values < numClass)].astype(np.int64), minlength=numClass)

    intersection = counts(pred[pred == label])
    return intersection, counts(pred) + counts(label) - intersection
