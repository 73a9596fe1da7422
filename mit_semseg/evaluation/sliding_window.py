"""A picture that goes through the network window by window: class probabilities from top to bottom, of which only the
rows that are worked on are in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.layers import at_least_float32
from .label_map import bilinear_neighbors, resized_rows
from .network import InferenceOptions, Model

STRIP = 64  # rows worked on at a time,
ELEMENTS = 2**24  # or as many as have so many probabilities: 64 MiB


@torch.inference_mode()
def score_strips(
    model: Model, scales: Sequence[Tensor], size: tuple[int, int], device: torch.device | str, view: InferenceOptions
) -> Iterator[Tensor]:
    """Class probabilities of a picture.

    A window's probabilities have the resolution of its scale; where windows overlap they are averaged, then resized
    (bilinear) to the picture.

    Args:
        model, scales, size, device, view: as of `inference.multi_scale_scores`; the view has a window.

    Yields:
        (C, h, width) from top to bottom, together `size`.
    """
    sources = [_Rows(window_rows(model, x, view, device), x.shape[-2:], size) for x in scales]
    top = 0
    while top < size[0]:
        rows = _rows_at_once(sources[0].classes, size[1])
        total: Tensor | None = None
        for source in sources:
            strip = source.resized(top, min(top + rows, size[0]))
            total = strip if total is None else total.add_(strip)
        yield total.div_(len(scales)) if len(scales) > 1 else total
        top += rows


def _rows_at_once(classes: int, width: int) -> int:
    return max(1, min(STRIP, ELEMENTS // (classes * width)))


@dataclass(frozen=True)
class _Look:
    """What the network has seen in a window.

    Attributes:
        seen: its logits (C, h, w) at the network's resolution, or, of a model that has none, probabilities.
        top, left, height, width: of the window, in pixels of the scale.
        align_corners: of the resize of logits to the window; None where there are probabilities.
    """

    seen: Tensor
    top: int
    left: int
    height: int
    width: int
    align_corners: bool | None

    def rows(self, start: int, stop: int) -> Tensor:
        """Probabilities (C, stop - start, width) of some rows of the window."""
        if self.align_corners is None:
            return self.seen[:, start:stop]
        size = self.height, self.width
        return resized_rows(self.seen, size, start, stop, self.align_corners).softmax(dim=0)


def _looks(model: Model, region: Tensor, view: InferenceOptions, top: int, left: int) -> Iterator[_Look]:
    """What the network sees in a region (1, 3, h, w), and what it sees in the mirrored one, mirrored back."""
    size = tuple(region.shape[-2:])
    with view.arithmetic(region.device):
        for mirrored in (False, True)[: 1 + view.flip]:
            feed = {"img_data": region.flip(-1) if mirrored else region}
            whole = hasattr(model, "logits")
            seen = (model.logits(feed) if whole else model(feed, segSize=size))[0]
            seen = at_least_float32(seen.flip(-1) if mirrored else seen)
            yield _Look(seen, top, left, *size, model.align_corners if whole else None)


@torch.inference_mode()
def window_rows(
    model: Model, x: Tensor, view: InferenceOptions, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Class probabilities of a picture in strips, each as soon as no window to come touches it.

    Args:
        x: (1, 3, h, w), normalized.
        view: with a window; a picture that is smaller than it goes through as a whole.

    Yields:
        (C, n, w) from top to bottom, together (C, h, w).
    """
    height, width = (min(own, wanted) for own, wanted in zip(x.shape[-2:], view.window, strict=True))
    tops, lefts = window_starts(x.size(-2), height, view.overlap), window_starts(x.size(-1), width, view.overlap)
    looks: list[_Look] = []  # into windows that are not finished
    for top, finished in zip(tops, [*tops[1:], x.size(-2)], strict=True):
        for left in lefts:
            region = x[..., top : top + height, left : left + width].to(device, non_blocking=True)
            looks += _looks(model, region, view, top, left)
        rows = _rows_at_once(len(looks[0].seen), x.size(-1))
        for start in range(top, finished, rows):
            yield _mean(looks, start, min(start + rows, finished), x.size(-1))
        looks = [look for look in looks if look.top + height > finished]


def _mean(looks: Sequence[_Look], start: int, stop: int, width: int) -> Tensor:
    """Mean probabilities (C, stop - start, width) of all windows that have a part in some rows."""
    like = looks[0].seen
    total, count = like.new_zeros(len(like), stop - start, width), like.new_zeros(stop - start, width)
    for look in looks:
        first, last = max(start, look.top), min(stop, look.top + look.height)
        if first < last:
            rows, columns = slice(first - start, last - start), slice(look.left, look.left + look.width)
            total[:, rows, columns] += look.rows(first - look.top, last - look.top)
            count[rows, columns] += 1
    return total.div_(count)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First positions of equally wide windows that cover a length, the last one flush with its end.

    Args:
        length: to be covered.
        window: width of a window, at most the length.
        overlap: share of a window that the next one covers again, at least.
    """
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]


class _Rows:
    """Rows of probabilities that arrive from top to bottom, handed out resized to another size.

    Args:
        strips: (C, n, w) each.
        source: (height, width) of all strips together.
        target: (height, width) they are resized to, bilinear, as `layers.resize` does.
    """

    def __init__(self, strips: Iterator[Tensor], source: tuple[int, int], target: tuple[int, int]):
        self.strips, self.source, self.target = strips, tuple(source), tuple(target)
        self.held = next(self.strips)
        self.classes = len(self.held)
        self.first = 0  # row number of the first row held

    def resized(self, top: int, bottom: int) -> Tensor:
        """Rows `top` to `bottom` of the result, (C, bottom - top, width); they are to be asked for in order."""
        low, share = (values[top:bottom] for values in bilinear_neighbors(self.source[0], self.target[0]))
        high = (low + 1).clamp(max=self.source[0] - 1)
        self._hold(int(low[0]), int(high[-1]))
        low, high = ((rows - self.first).to(self.held.device) for rows in (low, high))
        rows = torch.lerp(self.held[:, low], self.held[:, high], share.to(self.held).view(-1, 1))
        if self.source[1] == self.target[1]:
            return rows
        return F.interpolate(rows, self.target[1], mode="linear", align_corners=False)

    def _hold(self, first: int, last: int) -> None:
        """Take strips until the last row is there; forget the rows before the first."""
        parts = [self.held]
        while self.first + sum(part.size(1) for part in parts) <= last:
            parts.append(next(self.strips))
        self.held, self.first = torch.cat(parts, dim=1)[:, first - self.first :], first
