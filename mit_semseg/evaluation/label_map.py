"""Label maps from logits, without storing all class probabilities at image resolution.

A direct implementation resizes all logits to the image, applies softmax, averages over scales and takes the argmax.
With 150 classes, this needs 600 bytes per pixel for each scale. This module resizes only a few rows at a time. Its
label maps may differ only at pixels where two classes have equal probabilities up to rounding.
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
from ..lib.utils import cache_tensors, first_sentence

logger = logging.getLogger(__name__)
_opencv_lock = threading.Lock()

# Maximum number of probabilities per strip, see `probability_strips`. Small strips stay in the caches of a CPU; large
# strips need few kernel launches on other devices (256 MiB in float32).
CPU_STRIP_ELEMENTS, DEVICE_STRIP_ELEMENTS = 2**21, 2**26
SAMPLE_STRIDE = 4  # distance of sampled pixels; a 16th of the pixels suffices for statistics of probabilities
SAFE_RANGE = 100.0  # maximum difference of logits for which softmax cannot divide by zero, see `_ResizedLogits`


def label_map_from_logits(logits: Sequence[Tensor], size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Return the class with the largest mean probability at every pixel.

    Args:
        logits: floating point tensors (C, h, w), one per scale and flip, on one device; h and w may differ per scale.
        size: (height, width) of the image.
        align_corners: argument of `F.interpolate` for resizing the logits.

    Returns:
        (height, width) on the device of the logits, with the dtype `label_dtype(C)`. If probabilities are equal, the
        smallest class index is used.
    """
    logits = [x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in logits]
    device = logits[0].device
    if device.type == "cpu":
        with _single_opencv_thread():  # `_label_map_cpu` calls OpenCV in several threads
            return torch.from_numpy(_label_map_cpu([x.float().numpy() for x in logits], size, align_corners))
    if device.type == "cuda" and (kernel := _triton_kernel(device)):
        return kernel([x.float() for x in logits], size, align_corners)
    strips = probability_strips(logits, size, align_corners=align_corners, exact=False)
    return torch.cat([labels_of_strip(strip) for strip in strips])


def label_dtype(classes: int) -> torch.dtype:
    """Return the dtype of label maps: uint8 for at most 256 classes, else int16."""
    return torch.uint8 if classes <= 256 else torch.int16


def labels_of_strip(strip: Tensor) -> Tensor:
    """Return the class (n, width) with the largest score in a strip (C, n, width), see `label_dtype`."""
    return strip.argmax(dim=0).to(label_dtype(len(strip)))


@cache
def _triton_kernel(device: torch.device) -> Callable | None:
    """Return the Triton kernel, or None if Triton is missing or cannot compile the kernel (no C compiler, old GPU)."""
    try:
        from .label_map_triton import label_map_triton

        label_map_triton([torch.zeros(2, 1, 1, device=device)], (1, 1), False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, the C compiler and the driver raise many types of errors
        reason = f"{type(error).__name__}: {first_sentence(error)}"
        logger.warning("label maps are computed without Triton, by a slower implementation (%s)", reason)
        return None
    return label_map_triton


@contextmanager
def _single_opencv_thread() -> Iterator[None]:
    """Context in which OpenCV uses one thread. The setting is global, so a lock excludes other callers."""
    with _opencv_lock:
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            yield
        finally:
            cv2.setNumThreads(before)


def _label_map_cpu(logits: Sequence[np.ndarray], size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Return the label map (H, W); several threads compute one band of rows each."""
    views = [_ResizedLogits(x, size, align_corners) for x in logits]
    labels = torch.empty(size, dtype=label_dtype(len(logits[0]))).numpy()
    threads = min(torch.get_num_threads(), size[0])
    bands = pairwise(size[0] * i // threads for i in range(threads + 1))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda band: _label_rows(views, *band, labels), bands))
    return labels


def _label_rows(views: Sequence["_ResizedLogits"], start: int, stop: int, labels: np.ndarray) -> None:
    """Compute rows `start` to `stop` - 1 of `labels`, row by row to keep the data in the CPU caches.

    The functions of OpenCV are several times faster here than those of NumPy. `cv2.exp` has a relative error of 1.2e-7.
    """
    shape = views[0].classes, labels.shape[1]
    total, scores = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rows: list[dict[int, np.ndarray]] = [{} for _ in views]
    last = shape[0] - 1
    # `from_end` is largest for the first of several classes with equal scores; a maximum is much faster than `argmax`.
    from_end = np.arange(last, -1, -1, dtype=np.min_scalar_type(last))[:, None]
    for number in range(start, stop):
        for i, (view, cached) in enumerate(zip(views, rows, strict=True)):
            out = scores if i else total
            view.write_row(number, out, cached)
            if len(views) > 1:  # softmax would not change the argmax of a single view
                if not view.safe:
                    np.subtract(out, cv2.reduce(out, 0, cv2.REDUCE_MAX), out=out)
                cv2.exp(out, dst=out)
                np.multiply(out, 1 / cv2.reduce(out, 0, cv2.REDUCE_SUM), out=out)
            if i:
                cv2.add(total, scores, dst=total)
        labels[number] = last - np.multiply(total >= total.max(axis=0), from_end).max(axis=0)


class _ResizedLogits:
    """Logits (C, h, w) minus the maximum over the classes at each position, resized row by row to (H, W).

    Attributes:
        safe: whether softmax cannot divide by zero. The largest logit at every source position is 0. A pixel is the
            weighted mean of four positions, and the largest weight is at least 1/4. If no logit is below -100, the
            largest logit of a pixel is therefore at least -75, and exp(-75) does not underflow in float32.
    """

    def __init__(self, logits: np.ndarray, size: tuple[int, int], align_corners: bool):
        self.logits = logits - logits.max(axis=0)  # keeps the ranking of the classes, because resizing is linear
        self.safe = bool(self.logits.min() > -SAFE_RANGE)
        self.classes, height, width = logits.shape
        cpu = torch.device("cpu")
        neighbors = bilinear_neighbors(height, size[0], align_corners, torch.float64, cpu)
        self.low, self.high, self.weight = (values.tolist() for values in neighbors)
        neighbors = bilinear_neighbors(width, size[1], align_corners, torch.float32, cpu)
        self.left, self.right, self.right_weight = (values.numpy() for values in neighbors)

    def write_row(self, number: int, out: np.ndarray, cached: dict[int, np.ndarray]) -> None:
        """Write row `number` of the resized logits to `out` (C, W); `cached` stores source rows for later calls."""
        above, below = (self._source_row(rows[number], cached) for rows in (self.low, self.high))
        weight = self.weight[number]
        cv2.addWeighted(above, 1 - weight, below, weight, 0, dst=out)

    def _source_row(self, number: int, cached: dict[int, np.ndarray]) -> np.ndarray:
        """Return row `number` of the logits, resized horizontally to (C, W)."""
        if number not in cached:
            for old in [n for n in cached if n < number - 1]:
                del cached[old]
            row = np.ascontiguousarray(self.logits[:, number])
            left, right = row.take(self.left, 1), row.take(self.right, 1)
            right -= left
            right *= self.right_weight
            right += left
            cached[number] = right
        return cached[number]


def probability_strips(
    logits: Sequence[Tensor], size: tuple[int, int], *, align_corners: bool = False, exact: bool = True
) -> Iterator[Tensor]:
    """Yield strips of class probabilities, averaged over scales and flips, from top to bottom.

    Args:
        logits, size, align_corners: see `label_map_from_logits`.
        exact: False yields logits instead of probabilities for a single scale without flip; the argmax is the same.

    Yields:
        Tensors (C, n, width) for n rows each, `height` rows in total.
    """
    height, rows = size[0], rows_per_strip(logits[0], size[1])
    for top in range(0, height, rows):
        total: Tensor | None = None
        for x in logits:
            scores = resize_rows(x, size, top, min(top + rows, height), align_corners)
            if exact or len(logits) > 1:
                scores = scores.softmax(dim=0)
            total = scores if total is None else total.add_(scores)
        yield total.div_(len(logits)) if len(logits) > 1 else total


def sample_positions(size: tuple[int, int]) -> tuple[range, range]:
    """Return the rows and the columns of the sampled pixels in an image of size (height, width)."""
    return tuple(range(min(SAMPLE_STRIDE // 2, (side - 1) // 2), side, SAMPLE_STRIDE) for side in size)


def sampled_logits(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Return the logits (C, n, m) at the `sample_positions` of an image, for logits `x` (C, h, w) of one scale."""
    for dim, (positions, side) in enumerate(zip(sample_positions(size), size, strict=True), start=1):
        neighbors = bilinear_neighbors(x.size(dim), side, align_corners, x.dtype, x.device)
        low, high, weight = (values[positions.start :: positions.step] for values in neighbors)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight.view(-1, 1) if dim == 1 else weight)
    return x


def sampled_probabilities(logits: Sequence[Tensor], size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Return the class probabilities (C, n, m) at the `sample_positions` of an image; see `probability_strips`."""
    return sum(sampled_logits(x, size, align_corners=align_corners).softmax(dim=0) for x in logits) / len(logits)


def rows_per_strip(logits: Tensor, width: int) -> int:
    """Return the number of rows in a strip (C, rows, width) of probabilities; `logits`: (C, h, w) on the device."""
    elements = CPU_STRIP_ELEMENTS if logits.device.type == "cpu" else DEVICE_STRIP_ELEMENTS
    return max(1, elements // (len(logits) * width))


def resize_rows(x: Tensor, size: tuple[int, int], top: int, bottom: int, align_corners: bool) -> Tensor:
    """Return rows `top` to `bottom` - 1 of `x` (C, h, w) after bilinear resizing to (C, *size)."""
    neighbors = bilinear_neighbors(x.size(1), size[0], align_corners, x.dtype, x.device)
    low, high, weight = (values[top:bottom] for values in neighbors)
    rows = torch.lerp(x[:, low], x[:, high], weight.view(-1, 1))
    if rows.size(-1) == size[1]:
        return rows
    return resize_columns(rows, size[1], align_corners)


def resize_columns(rows: Tensor, width: int, align_corners: bool) -> Tensor:
    """Resize (C, n, w) to (C, n, width). On GPUs, bilinear resizing is much faster here than mode "linear"."""
    return F.interpolate(rows[None], (rows.size(1), width), mode="bilinear", align_corners=align_corners)[0]


@cache_tensors
def bilinear_neighbors(
    source: int, target: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For every resized position, return both source neighbors and the weight of the upper source neighbor.

    Args:
        source, target: lengths before and after resizing, in pixels.
        dtype: dtype of the weights.

    Returns:
        Lower neighbors (target,) int64, upper neighbors (target,) int64, and weights (target,).
    """
    position = torch.arange(target, dtype=torch.float64, device=device)
    if align_corners:
        position = position * ((source - 1) / max(target - 1, 1))
    else:
        position = ((position + 0.5) * source / target - 0.5).clamp(min=0)
    low = position.floor().clamp(max=source - 1)
    return low.long(), (low + 1).clamp(max=source - 1).long(), (position - low).to(dtype)
