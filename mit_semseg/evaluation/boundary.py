"""Boundary IoU: IoU of the pixels that are near a boundary of their class in the label or in the prediction.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", 2021. As in the paper, the image
border is a boundary. Boundaries between labelled and ignored pixels are not boundaries.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..lib import opencv as cv2

DILATION = 0.02  # width of boundary regions, as a fraction of the diagonal of the image
LARGE = 32767  # larger than every class index


def boundary_counts(prediction: Tensor, label: Tensor, num_class: int) -> Tensor:
    """Return numbers of pixels in the boundary regions of every class, without waiting for the device.

    Args:
        prediction: (H, W) class indices, not negative.
        label: (H, W) int64 class indices, negative where ignored.

    Returns:
        (3, num_class) int64: pixels in the boundary region of the label, of the prediction, and of both.
    """
    valid = (label >= 0) & (label < num_class)
    prediction = torch.where(valid, prediction.to(label.dtype), -1)
    label = torch.where(valid, label, -1)
    width = boundary_width(label.shape)
    near_label, near_prediction = (near_boundary(classes, width) for classes in (label, prediction))
    regions = (
        (label, near_label),
        (prediction, near_prediction),
        (label, near_label & near_prediction & (label == prediction)),
    )
    # Class -1 (pixels outside the region) is counted as class 0 with offset 1, and dropped.
    return torch.stack([_count(torch.where(near, classes, -1) + 1, num_class + 1)[1:] for classes, near in regions])


def _count(values: Tensor, length: int) -> Tensor:
    values = values.flatten()
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=length)
    # `bincount` reads the largest value from the device
    return values.new_zeros(length).scatter_add_(0, values, values.new_ones(()).expand_as(values))


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """Return the boundary IoU (C,) for sums of `boundary_counts`; NaN for a class without boundary pixels."""
    label, prediction, both = counts
    union = label + prediction - both
    return np.divide(both, union, out=np.full(len(union), np.nan), where=union > 0)


def boundary_width(size: tuple[int, int]) -> int:
    """Return the width in pixels of boundary regions in an image of size (height, width)."""
    return max(1, round(DILATION * math.hypot(*size)))


def near_boundary(classes: Tensor, width: int) -> Tensor:
    """Return which pixels are near a boundary (H, W): at most `width` pixels from another class or the image border.

    The distance is the maximum of the horizontal and vertical distance. The classes (H, W) are integers; other pixels
    with a negative class are never a boundary.
    """
    lowest, highest = _window_range(classes, width)
    near = lowest != highest
    height, columns = near.shape
    near[: min(width, height)] = near[max(height - width, 0) :] = True
    near[:, : min(width, columns)] = near[:, max(columns - width, 0) :] = True
    return near


def _window_range(classes: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest class (H, W) that is not negative, in windows of 2 * `width` + 1 pixels.

    In a window without such a class, the results are arbitrary.
    """
    function = _window_range_opencv if classes.device.type == "cpu" else _window_range_pooling
    return function(torch.where(classes < 0, LARGE, classes), classes, 2 * width + 1)


def _window_range_opencv(low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor]:
    kernel = np.ones((side, side), np.uint8)
    lowest, highest = cv2.erode(low.short().numpy(), kernel), cv2.dilate(high.short().numpy(), kernel)
    return torch.from_numpy(lowest), torch.from_numpy(highest)


def _window_range_pooling(low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor]:
    def maximum(x: Tensor) -> Tensor:
        x = F.max_pool2d(x[None, None].float(), (side, 1), 1, (side // 2, 0))
        return F.max_pool2d(x, (1, side), 1, (0, side // 2))[0, 0]

    return -maximum(-low), maximum(high)
