"""Sliding window inference, which yields class probabilities in strips of rows to limit memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .label_map import bilinear_neighbors, resize_columns, resize_rows, rows_per_strip

MAX_WINDOWS = {"cuda": 8}  # maximum number of windows per batch; 1 on other devices, where batches are not faster

# Function from image regions (N, 3, h, w) to a list of logits (N, C, h', w'), one element per flip.
LogitsOfRegions = Callable[[Tensor], Sequence[Tensor]]


class Window(NamedTuple):
    """Logits (C, h, w) of a sliding window; position and size of the window in pixels of the resized image."""

    logits: Tensor
    left: int
    top: int
    height: int
    width: int


@torch.inference_mode()
def sliding_window_strips(
    logits_of: LogitsOfRegions,
    scales: Sequence[Tensor],
    size: tuple[int, int],
    window: tuple[int, int],
    overlap: float,
    align_corners: bool = False,
) -> Iterator[Tensor]:
    """Yield class probabilities of an image, averaged over overlapping windows, flips and scales.

    For each scale, averages over windows and flips are computed first, then resized bilinearly to the image size.

    Args:
        logits_of: function that applies the network to regions of a resized image.
        scales: normalized images (1, 3, h, w), one per scale.
        size: (height, width) of the image.
        window: (height, width) of the sliding window; each side is limited to the side of the resized image.
        overlap: minimum overlap of neighboring windows as a fraction of the window size, at least 0 and below 1.
        align_corners: argument of `F.interpolate` for resizing the logits of a window.

    Yields:
        Tensors (C, n, width) for n rows each, from top to bottom, `height` rows in total.
    """
    sources = [
        _ResizedStrips(_window_strips(logits_of, x, window, overlap, align_corners), x.shape[-2:], size) for x in scales
    ]
    rows = rows_per_strip(sources[0].buffer, size[1])
    for top in range(0, size[0], rows):
        total: Tensor | None = None
        for source in sources:
            strip = source.rows(top, min(top + rows, size[0]))
            total = strip if total is None else total.add_(strip)
        yield total.div_(len(scales)) if len(scales) > 1 else total


def _window_strips(
    logits_of: LogitsOfRegions, x: Tensor, window: tuple[int, int], overlap: float, align_corners: bool
) -> Iterator[Tensor]:
    """Yield strips (C, n, w) of class probabilities for one scale `x` (1, 3, h, w)."""
    height, width = (min(side, limit) for side, limit in zip(x.shape[-2:], window, strict=True))
    tops, lefts = window_starts(x.size(-2), height, overlap), window_starts(x.size(-1), width, overlap)
    batch = MAX_WINDOWS.get(x.device.type, 1)
    open_windows: list[Window] = []
    for top, finished in zip(tops, [*tops[1:], x.size(-2)], strict=True):
        for i in range(0, len(lefts), batch):
            batch_lefts = lefts[i : i + batch]
            regions = torch.cat([x[..., top : top + height, left : left + width] for left in batch_lefts])
            for logits in logits_of(regions):
                open_windows += [Window(*pair, top, height, width) for pair in zip(logits, batch_lefts, strict=True)]
        rows = rows_per_strip(open_windows[0].logits, x.size(-1))
        for start in range(top, finished, rows):
            yield _mean_rows(open_windows, start, min(start + rows, finished), x.size(-1), align_corners)
        open_windows = [entry for entry in open_windows if entry.top + height > finished]


def _mean_rows(windows: Sequence[Window], start: int, stop: int, width: int, align_corners: bool) -> Tensor:
    """Return rows `start` to `stop` - 1 of the class probabilities (C, stop - start, width), averaged over windows."""
    like = windows[0].logits
    total, count = like.new_zeros(len(like), stop - start, width), like.new_zeros(stop - start, width)
    for window in windows:
        first, last = max(start, window.top), min(stop, window.top + window.height)
        if first < last:
            rows, columns = slice(first - start, last - start), slice(window.left, window.left + window.width)
            probabilities = resize_rows(
                window.logits, (window.height, window.width), first - window.top, last - window.top, align_corners
            ).softmax(dim=0)
            total[:, rows, columns] += probabilities
            count[rows, columns] += 1
    return total.div_(count)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the start positions of windows that cover `length`; the last window ends at `length`.

    Args:
        length: height or width of the resized image.
        window: height or width of a window, at most `length`.
        overlap: see `sliding_window_strips`.
    """
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]


class _ResizedStrips:
    """Resizes probabilities from `source` to `target` size, given as strips (C, n, w) from top to bottom."""

    def __init__(self, strips: Iterator[Tensor], source: tuple[int, int], target: tuple[int, int]):
        self._strips, self._source, self._target = strips, tuple(source), tuple(target)
        self.buffer, self._first = next(strips), 0  # the buffer starts at source row `_first`

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return resized rows `top` to `bottom` - 1, (C, bottom - top, width). Call this from top to bottom."""
        arguments = self._source[0], self._target[0], False, self.buffer.dtype
        low, high, _ = bilinear_neighbors(*arguments, torch.device("cpu"))  # reading from a GPU would synchronize
        self._fill(int(low[top]), int(high[bottom - 1]))
        low, high, weight = (values[top:bottom] for values in bilinear_neighbors(*arguments, self.buffer.device))
        low, high = (self.buffer[:, rows - self._first] for rows in (low, high))
        rows = torch.lerp(low, high, weight.view(-1, 1))
        if self._source[1] == self._target[1]:
            return rows
        return resize_columns(rows, self._target[1], align_corners=False)

    def _fill(self, first: int, last: int) -> None:
        """Read strips until row `last` is available; drop the rows before row `first`."""
        parts = [self.buffer]
        while self._first + sum(part.size(1) for part in parts) <= last:
            parts.append(next(self._strips))
        self.buffer, self._first = torch.cat(parts, dim=1)[:, first - self._first :], first
