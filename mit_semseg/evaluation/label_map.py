"""From logits to a label map, without the scores of all classes at the picture's size.

The straightforward way resizes the logits of every class to the picture, takes the softmax, averages over the scales
and then the class with the largest mean: with 150 classes that is 600 bytes a pixel and scale. Here only a few rows, or
one class, are at the picture's size at a time; the label map is the same but for ties within rounding.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..lib import opencv as cv2
from ..lib.utils import first_sentence
from ..models.layers import at_least_float32

logger = logging.getLogger(__name__)
_opencv_lock = threading.Lock()

ELEMENTS = 2**21  # scores at the picture's size that are worked on at a time where OpenCV does not do it
SAFE_RANGE = 100.0  # of logits, see `_View`
CV_LIMIT = 2**15 - 1  # sides of pictures that OpenCV resizes
BYTE_CLASSES = 256
LARGE = 2**21  # pixels from which the scores of one class do not stay in the caches, and rows of all classes do better


def label_map_from_logits(logits: Sequence[Tensor], size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """The class with the largest mean probability of every pixel.

    Args:
        logits: (C, h, w) floating point each, of one or more views of a picture, on one device; h and w may differ.
        size: (height, width) of the picture.
        align_corners: of the bilinear resize, see `layers.resize`.

    Returns:
        (height, width) int64 on the logits' device; of equal probabilities the first class wins.

    Raises:
        ValueError: no logits.
    """
    if not logits:
        raise ValueError("no logits to make a label map of")
    logits = [at_least_float32(x.detach()) for x in logits]
    first = logits[0]
    plain = first.device.type == "cpu" and first.dtype == torch.float32 and max(*size, *first.shape) <= CV_LIMIT
    if first.device.type == "cuda" and first.dtype == torch.float32 and (fused := _fused(first.device)):
        sides = [
            [bilinear_neighbors(n, m, align_corners) for n, m in zip(x.shape[1:], size, strict=True)] for x in logits
        ]
        return fused(logits, size, sides)
    if not plain:
        return _by_strips(logits, size, align_corners)
    # The softmax does not change the order of the classes, so one view needs none.
    small = size[0] * size[1] <= LARGE
    if small and len(logits) == 1 and not align_corners and len(first) <= BYTE_CLASSES:
        with _opencv_threads(torch.get_num_threads()):
            return torch.from_numpy(_running_maximum(first.numpy(), size)).long()
    with _opencv_threads(1):  # in every thread of the pool
        return torch.from_numpy(_by_bands([x.numpy() for x in logits], size, align_corners))


@cache
def _fused(device: torch.device) -> Callable | None:
    """The kernel for GPUs; None where Triton, which comes with PyTorch for Linux, is missing, or cannot compile it (it
    needs a C compiler and Python's headers, and a GPU that is not too old)."""
    try:
        from .label_map_triton import label_map_triton

        one = torch.zeros(2, 1, 1, device=device)
        label_map_triton([one], (1, 1), [[bilinear_neighbors(1, 1, False)] * 2])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of the compiler, of the driver
        logger.warning(
            "label maps are made strip by strip, without Triton's kernel (%s: %s)",
            type(error).__name__,
            first_sentence(error),
        )
        return None
    return label_map_triton


def _running_maximum(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Class of the largest resized logit, (H, W) uint8, one class after the other."""
    height, width = size
    best, scores = (np.empty(size, np.float32) for _ in range(2))
    cv2.resize(logits[0], (width, height), dst=best, interpolation=cv2.INTER_LINEAR)
    labels, larger = np.zeros(size, np.uint8), np.empty(size, np.uint8)
    for number in range(1, len(logits)):
        cv2.resize(logits[number], (width, height), dst=scores, interpolation=cv2.INTER_LINEAR)
        cv2.compare(scores, best, cv2.CMP_GT, dst=larger)
        cv2.max(scores, best, dst=best)
        # The number is larger than all before: where the score is, it becomes the label.
        np.bitwise_and(larger, number, out=larger)
        np.maximum(larger, labels, out=labels)
    return labels


@contextmanager
def _opencv_threads(threads: int) -> Iterator[None]:
    """Set OpenCV's number of threads, and restore it. It is a global setting, so callers wait for one another."""
    with _opencv_lock:
        before = cv2.getNumThreads()
        cv2.setNumThreads(threads)
        try:
            yield
        finally:
            cv2.setNumThreads(before)


def _by_bands(logits: Sequence[np.ndarray], size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Label map (H, W) int64 on the CPU: every thread has a band of rows."""
    views = [_View(x, size, align_corners) for x in logits]
    labels = np.empty(size, np.int64)
    threads = min(torch.get_num_threads(), size[0])
    bounds = [size[0] * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda band: _band(views, *band, labels), pairwise(bounds)))
    return labels


def _band(views: Sequence["_View"], start: int, stop: int, labels: np.ndarray) -> None:
    """Labels of the rows start to stop, one after the other: the scores of a row stay in a processor's caches.

    OpenCV's functions take a fraction of the time of others here; its exponential is right to 1.2e-7.
    """
    shape = views[0].classes, labels.shape[1]
    total, scores = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rows: list[dict[int, np.ndarray]] = [{} for _ in views]
    for number in range(start, stop):
        for view, kept, out in zip(views, rows, [total] + [scores] * (len(views) - 1), strict=True):
            view.row(number, out, kept)
            if len(views) > 1:
                if not view.safe:
                    np.subtract(out, cv2.reduce(out, 0, cv2.REDUCE_MAX), out=out)
                cv2.exp(out, dst=out)
                np.multiply(out, 1 / cv2.reduce(out, 0, cv2.REDUCE_SUM), out=out)
            if out is scores:
                cv2.add(total, scores, dst=total)
        labels[number] = _first_largest(total)


def _first_largest(scores: np.ndarray) -> np.ndarray:
    """`scores.argmax(0)` of (C, W), which takes many times longer than a maximum."""
    last = len(scores) - 1
    # The first class that is the largest has the largest number, counted from the end.
    numbers = np.arange(last, -1, -1, dtype=np.min_scalar_type(last))[:, None]
    return last - np.multiply(scores >= scores.max(axis=0), numbers).max(axis=0).astype(np.int64)


class _View:
    """The logits of one view, less the largest of each position, resized to the picture row by row.

    Args:
        logits: (C, h, w) float32.
        size: (H, W) of the picture.
        align_corners: of the resize.

    Attributes:
        safe: the exponentials of a pixel cannot all vanish. At a position of the logits the best class is 0. Between
            four of them, one of which weighs 1/4 or more, it is above -3/4 of the range: exp(-75) is a normal float32,
            exp(-90) is not.
    """

    def __init__(self, logits: np.ndarray, size: tuple[int, int], align_corners: bool):
        # The resize is linear: it does not matter when the same is taken from all classes.
        self.logits = logits - logits.max(axis=0)
        self.safe = bool(self.logits.min() > -SAFE_RANGE)
        self.classes, self.height, _ = logits.shape
        self.width, self.align_corners = size[1], align_corners
        low, share = bilinear_neighbors(self.height, size[0], align_corners)
        self.low, self.share = low.tolist(), share.tolist()
        low, share = bilinear_neighbors(logits.shape[2], size[1], align_corners)
        self.left, self.right = low.numpy(), (low + 1).clamp(max=logits.shape[2] - 1).numpy()
        self.right_share = share.float().numpy()

    def row(self, number: int, out: np.ndarray, cache: dict[int, np.ndarray]) -> None:
        """Row `number` of the picture, written to `out` (C, W).

        Args:
            cache: rows of the logits at the picture's width, of this caller, who goes from top to bottom.
        """
        low, share = self.low[number], self.share[number]
        above, below = (self._wide(min(n, self.height - 1), cache) for n in (low, low + 1))
        cv2.addWeighted(above, 1 - share, below, share, 0, dst=out)

    def _wide(self, number: int, cache: dict[int, np.ndarray]) -> np.ndarray:
        """Row `number` of the logits at the picture's width, (C, W)."""
        if number not in cache:
            for old in [n for n in cache if n < number - 1]:
                del cache[old]
            row = np.ascontiguousarray(self.logits[:, number])
            if self.align_corners:
                left, right = row[:, self.left], row[:, self.right]
                cache[number] = left + (right - left) * self.right_share
            else:
                cache[number] = cv2.resize(row, (self.width, self.classes), interpolation=cv2.INTER_LINEAR)
        return cache[number]


def _by_strips(logits: Sequence[Tensor], size: tuple[int, int], align_corners: bool) -> Tensor:
    """Label map on any device and in any precision, as many rows at a time as fit into `ELEMENTS`, or more on a GPU."""
    strips = probability_strips(logits, size, align_corners=align_corners, exact=False)
    return torch.cat([strip.argmax(dim=0) for strip in strips])


def probability_strips(
    logits: Sequence[Tensor], size: tuple[int, int], *, align_corners: bool = False, exact: bool = True
) -> Iterator[Tensor]:
    """Class probabilities, averaged over the views, from top to bottom.

    Args:
        logits, size, align_corners: as of `label_map_from_logits`.
        exact: False leaves the softmax of a single view out; the order of the classes is the same.

    Yields:
        (C, n, width), together (C, height, width).
    """
    height, width = size
    elements = ELEMENTS if logits[0].device.type == "cpu" else 32 * ELEMENTS
    rows = max(1, min(height, elements // (len(logits[0]) * width)))
    for top in range(0, height, rows):
        total: Tensor | None = None
        for x in logits:
            scores = resized_rows(at_least_float32(x), size, top, min(top + rows, height), align_corners)
            if exact or len(logits) > 1:
                scores = scores.softmax(dim=0)
            total = scores if total is None else total.add_(scores)
        yield total.div_(len(logits)) if len(logits) > 1 else total


def resized_rows(x: Tensor, size: tuple[int, int], top: int, bottom: int, align_corners: bool) -> Tensor:
    """Rows top to bottom of (C, h, w) resized to (C, *size)."""
    low, share = bilinear_neighbors(x.size(1), size[0], align_corners)
    low, share = low[top:bottom].to(x.device), share[top:bottom].to(x).view(-1, 1)
    rows = torch.lerp(x[:, low], x[:, (low + 1).clamp(max=x.size(1) - 1)], share)
    if rows.size(-1) == size[1]:
        return rows
    return F.interpolate(rows, size[1], mode="linear", align_corners=align_corners)


def bilinear_neighbors(source: int, target: int, align_corners: bool = False) -> tuple[Tensor, Tensor]:
    """For every position of a bilinear resize: the neighbour before it, and the share of the one after it.

    Args:
        source, target: number of positions before and after.
        align_corners: see `layers.resize`.

    Returns:
        (target,) int64 and (target,) float64.
    """
    place = torch.arange(target, dtype=torch.float64)
    if align_corners:
        place = place * ((source - 1) / max(target - 1, 1))
    else:
        place = ((place + 0.5) * source / target - 0.5).clamp(min=0)
    low = place.floor().clamp(max=source - 1)
    return low.long(), place - low
