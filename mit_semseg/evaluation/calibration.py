"""Calibration of class probabilities: expected calibration error and reliability.

Guo et al., "On Calibration of Modern Neural Networks", 2017.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 15  # bins of equal width for the confidence, as in the paper
UNIT = 2**24  # confidences are summed as integers in this unit, so that sums do not depend on the order of images


def calibration_counts(probabilities: Tensor, label: Tensor) -> Tensor:
    """Count the pixels in every bin of confidence (largest probability), without waiting for the device.

    Args:
        probabilities: (C, h, w) class probabilities.
        label: (h, w) int64 class indices, negative where ignored.

    Returns:
        (3, `BINS`) int64: number of pixels, number of correct pixels, and sum of the confidence in units of 1 / `UNIT`.
    """
    confidence, predicted = probabilities.float().max(dim=0)
    valid = label >= 0
    index = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1).flatten()
    terms = torch.stack([valid, valid & (predicted == label), (confidence * UNIT).round() * valid]).long().flatten(1)
    return index.new_zeros(3, BINS).scatter_add_(1, index.expand(3, -1), terms)


@dataclass(frozen=True)
class Reliability:
    """Accuracy and confidence of the predictions in every bin.

    Attributes:
        pixels: (BINS,) number of pixels.
        accuracy: (BINS,) fraction of the pixels that are correct, NaN for empty bins.
        confidence: (BINS,) mean confidence, NaN for empty bins.
        error: expected calibration error, the mean of |accuracy - confidence| over all pixels; 0 without pixels.
    """

    pixels: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    error: float

    @classmethod
    def from_counts(cls, counts: np.ndarray) -> "Reliability":
        """Return the reliability for sums of `calibration_counts`."""
        pixels, correct, confidence = counts[0], counts[1], counts[2] / UNIT
        error = np.abs(correct - confidence).sum() / max(pixels.sum(), 1)
        mean = [np.divide(x, pixels, out=np.full(BINS, np.nan), where=pixels > 0) for x in (correct, confidence)]
        return cls(pixels, *mean, float(error))
