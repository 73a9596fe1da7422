"""Sliding window inference: class probabilities from top to bottom, with only a few rows in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .label_map import bilinear_neighbors, resize_rows

STRIP_ROWS = 64
STRIP_ELEMENTS = 2**24  # probabilities per strip: 64 MiB


@dataclass(frozen=True)
class WindowScores:
    """Scores of the network for one window.

    Attributes:
        scores: (C, h, w) logits at the network's resolution, or probabilities (C, height, width).
        align_corners: of the resize of logits to the window; None if the scores are probabilities.
        top, left, height, width: position of the window in the image, in pixels.
    """

    scores: Tensor
    align_corners: bool | None
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the probabilities (C, stop - start, width) of rows of the window."""
        if self.align_corners is None:
            return self.scores[:, start:stop]
        size = self.height, self.width
        return resize_rows(self.scores, size, start, stop, self.align_corners).softmax(dim=0)


# Region (1, 3, h, w) -> scores of the network, one entry per flip, and align_corners of `WindowScores`.
ScoreRegion = Callable[[Tensor], tuple[Sequence[Tensor], bool | None]]


@torch.inference_mode()
def sliding_window_strips(
    score: ScoreRegion,
    scales: Sequence[Tensor],
    size: tuple[int, int],
    window: tuple[int, int],
    overlap: float,
) -> Iterator[Tensor]:
    """Yield class probabilities of an image, averaged over overlapping windows, flips and scales.

    Probabilities are averaged at the resolution of each scale, then resized (bilinear) to the image.

    Args:
        score: applies the network to a region.
        scales: (1, 3, h, w) normalized images, one per scale.
        size: (height, width) of the image.
        window: (height, width), at most the size of a scale is used.
        overlap: minimum overlap of neighboring windows as a fraction of the window, 0 to below 1.

    Yields:
        (C, n, width) from top to bottom, together (C, height, width).
    """
    sources = [_ResizedStrips(window_strips(score, x, window, overlap), x.shape[-2:], size) for x in scales]
    rows = _strip_rows(sources[0].classes, size[1])
    for top in range(0, size[0], rows):
        total: Tensor | None = None
        for source in sources:
            strip = source.rows(top, min(top + rows, size[0]))
            total = strip if total is None else total.add_(strip)
        yield total.div_(len(scales)) if len(scales) > 1 else total


def _strip_rows(classes: int, width: int) -> int:
    return max(1, min(STRIP_ROWS, STRIP_ELEMENTS // (classes * width)))


@torch.inference_mode()
def window_strips(score: ScoreRegion, x: Tensor, window: tuple[int, int], overlap: float) -> Iterator[Tensor]:
    """Yield class probabilities of one scale, each strip as soon as no further window covers it.

    Args:
        score, window, overlap: see `sliding_window_strips`.
        x: (1, 3, h, w), normalized.

    Yields:
        (C, n, w) from top to bottom, together (C, h, w).
    """
    height, width = (min(side, limit) for side, limit in zip(x.shape[-2:], window, strict=True))
    tops, lefts = window_starts(x.size(-2), height, overlap), window_starts(x.size(-1), width, overlap)
    open_windows: list[WindowScores] = []
    for top, finished in zip(tops, [*tops[1:], x.size(-2)], strict=True):
        for left in lefts:
            entries, align_corners = score(x[..., top : top + height, left : left + width])
            open_windows += [WindowScores(entry, align_corners, top, left, height, width) for entry in entries]
        rows = _strip_rows(len(open_windows[0].scores), x.size(-1))
        for start in range(top, finished, rows):
            yield _mean_rows(open_windows, start, min(start + rows, finished), x.size(-1))
        open_windows = [entry for entry in open_windows if entry.top + height > finished]


def _mean_rows(windows: Sequence[WindowScores], start: int, stop: int, width: int) -> Tensor:
    """Mean probabilities (C, stop - start, width) of the windows that cover some rows."""
    like = windows[0].scores
    total, count = like.new_zeros(len(like), stop - start, width), like.new_zeros(stop - start, width)
    for window in windows:
        first, last = max(start, window.top), min(stop, window.top + window.height)
        if first < last:
            rows, columns = slice(first - start, last - start), slice(window.left, window.left + window.width)
            total[:, rows, columns] += window.rows(first - window.top, last - window.top)
            count[rows, columns] += 1
    return total.div_(count)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the first positions of windows that cover a length; the last window ends at its end.

    Args:
        length: to cover.
        window: length of a window, at most `length`.
        overlap: see `sliding_window_strips`.
    """
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]


class _ResizedStrips:
    """Rows of probabilities that arrive from top to bottom, resized (bilinear) to another size.

    Args:
        strips: (C, n, w) each.
        source: (height, width) of all strips together.
        target: (height, width) after resizing.
    """

    def __init__(self, strips: Iterator[Tensor], source: tuple[int, int], target: tuple[int, int]):
        self._strips, self._source, self._target = strips, tuple(source), tuple(target)
        self._buffer = next(strips)  # rows from `_first` on
        self._first = 0
        self.classes = len(self._buffer)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return rows top to bottom of the result, (C, bottom - top, width); calls go from top to bottom."""
        low, weight = (values[top:bottom] for values in bilinear_neighbors(self._source[0], self._target[0]))
        high = (low + 1).clamp(max=self._source[0] - 1)
        self._fill(int(low[0]), int(high[-1]))
        low, high = ((rows - self._first).to(self._buffer.device) for rows in (low, high))
        rows = torch.lerp(self._buffer[:, low], self._buffer[:, high], weight.to(self._buffer).view(-1, 1))
        if self._source[1] == self._target[1]:
            return rows
        return F.interpolate(rows, self._target[1], mode="linear", align_corners=False)

    def _fill(self, first: int, last: int) -> None:
        """Read strips up to the last row and drop the rows before the first."""
        parts = [self._buffer]
        while self._first + sum(part.size(1) for part in parts) <= last:
            parts.append(next(self._strips))
        self._buffer, self._first = torch.cat(parts, dim=1)[:, first - self._first :], first
