"""From a network and a picture to a label map: several scales, mirrored, whole or window by window."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import prepared
from .upsampling import label_map_of, places

Model = Callable[..., Tensor]  # module({"img_data": (1, 3, h, w)}, segSize=(H, W)) -> probabilities (1, C, H, W)
STRIP = 64  # rows of the result worked on at a time, where the picture goes through the network in windows


@dataclass(frozen=True)
class View:
    """How a network looks at a picture, beside its scales.

    Attributes:
        flip: also mirrored left to right; both count the same.
        window: (height, width) of the regions that go through the network one by one; None takes the whole picture.
        overlap: share of a window that the next one covers again, at least, in 0..1 (below 1).
        precision: of the network, see `network.PRECISIONS`. `fp32` is strict: on NVIDIA GPUs `auto` multiplies in
            convolutions as PyTorch does by default, with inputs rounded to 10 bits (TF32).
        compiled: the encoder, by `torch.compile`.
    """

    flip: bool = False
    window: tuple[int, int] | None = None
    overlap: float = 1 / 3
    precision: str = "auto"
    compiled: bool = False

    def network(self, module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
        """A copy of a module that looks at pictures this way, see `network.prepared`."""
        return prepared(module, device, precision=self.precision, compiled=self.compiled)

    def arithmetic(self, device: torch.device | str) -> AbstractContextManager:
        """Context in which the network is to run."""
        if self.precision == "fp32" and torch.device(device).type == "cuda":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()


WHOLE = View()


def label_map(model: Model, item: dict, device: torch.device | str = "cpu", view: View = WHOLE) -> np.ndarray:
    """The most probable class of every pixel.

    Args:
        model: a `SegmentationModule` in eval mode, whose class scores never have the picture's size; or any callable of
            the same form.
        item: of a `ValDataset` or `TestDataset`: `img_ori` (H, W, 3) and `img_data`, one tensor per scale.
        device: where the model is.
        view: mirrored, windows.

    Returns:
        (H, W) int64 class indices.
    """
    size = tuple(item["img_ori"].shape[:2])
    if view.window is None and hasattr(model, "logits"):
        logits = _all_logits(model, item["img_data"], device, view)
        return label_map_of(logits, size, align_corners=model.align_corners).cpu().numpy()
    if view.window is None:
        return multi_scale_scores(model, item["img_data"], size, device, view).argmax(dim=0).cpu().numpy()
    strips = score_strips(model, item["img_data"], size, device, view)
    return np.concatenate([strip.argmax(dim=0).cpu().numpy() for strip in strips])


@torch.inference_mode()
def _all_logits(model: Model, scales: Sequence[Tensor], device: torch.device | str, view: View) -> list[Tensor]:
    """Logits (C, h, w) of every scale, and of its mirrored picture, mirrored back."""
    logits = []
    with view.arithmetic(device):
        for x in (scale.to(device, non_blocking=True) for scale in scales):
            logits.append(model.logits({"img_data": x})[0])
            if view.flip:
                logits.append(model.logits({"img_data": x.flip(-1)})[0].flip(-1))
    return logits


@torch.inference_mode()
def multi_scale_scores(
    model: Model,
    scales: Sequence[Tensor],
    size: tuple[int, int],
    device: torch.device | str = "cpu",
    view: View = WHOLE,
) -> Tensor:
    """Class probabilities of a picture, averaged over its scales and what `view` adds.

    Args:
        model, device, view: as of `label_map`.
        scales: normalized pictures (1, 3, h, w), one per scale.
        size: (height, width) of the result, the picture's own.

    Returns:
        (C, height, width) on `device`, summing to 1 over C.
    """
    if view.window is not None:
        return torch.cat(list(score_strips(model, scales, size, device, view)), dim=1)
    total: Tensor | None = None
    for x in scales:
        scores = _scores(model, x.to(device, non_blocking=True), size, view)
        total = scores if total is None else total.add_(scores)
    return total.div_(len(scales)) if len(scales) > 1 else total


def _scores(model: Model, x: Tensor, size: tuple[int, int], view: View) -> Tensor:
    """Probabilities (C, *size) of a picture or region (1, 3, h, w)."""
    with view.arithmetic(x.device):
        scores = model({"img_data": x}, segSize=size)[0]
        if not view.flip:
            return scores
        mirrored = model({"img_data": x.flip(-1)}, segSize=size)[0].flip(-1)
        return scores.add_(mirrored).div_(2)


@torch.inference_mode()
def score_strips(
    model: Model,
    scales: Sequence[Tensor],
    size: tuple[int, int],
    device: torch.device | str = "cpu",
    view: View = WHOLE,
) -> Iterator[Tensor]:
    """Class probabilities from top to bottom, the network looking through windows.

    A window's probabilities have the resolution of its scale; where windows overlap they are averaged, then resized
    (bilinear) to the picture. Only the rows that are worked on are in memory, whatever the picture's height.

    Args:
        model, scales, size, device, view: as of `multi_scale_scores`; the view has a window.

    Yields:
        (C, h, width), at most `STRIP` rows each, together `size`.
    """
    height = size[0]
    rows = [_Rows(window_rows(model, x, view, device), x.shape[-2:], size) for x in scales]
    for top in range(0, height, STRIP):
        bottom = min(top + STRIP, height)
        total: Tensor | None = None
        for source in rows:
            strip = source.resized(top, bottom)
            total = strip if total is None else total.add_(strip)
        yield total.div_(len(scales)) if len(scales) > 1 else total


@torch.inference_mode()
def window_rows(model: Model, x: Tensor, view: View, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Class probabilities of a picture in strips, each as soon as no window to come touches it.

    Args:
        x: (1, 3, h, w), normalized.
        view: with a window; a picture that is smaller than it goes through as a whole.

    Yields:
        (C, n, w) from top to bottom, together (C, h, w).
    """
    height, width = (min(own, wanted) for own, wanted in zip(x.shape[-2:], view.window, strict=True))
    tops, lefts = window_starts(x.size(-2), height, view.overlap), window_starts(x.size(-1), width, view.overlap)
    open_rows: Tensor | None = None  # sums over the windows, from the first unfinished row on
    counts: Tensor | None = None
    for number, top in enumerate(tops):
        for left in lefts:
            region = x[..., top : top + height, left : left + width].to(device, non_blocking=True)
            scores = _scores(model, region, (height, width), view)
            if open_rows is None:
                open_rows = scores.new_zeros(scores.size(0), height, x.size(-1))
                counts = scores.new_zeros(height, x.size(-1))
            open_rows[..., left : left + width] += scores
            counts[..., left : left + width] += 1
        finished = tops[number + 1] - top if number + 1 < len(tops) else height
        yield open_rows[:, :finished] / counts[:finished]
        rest = height - finished
        if number + 1 < len(tops):
            for buffer in (open_rows, counts):
                buffer[..., :rest, :] = buffer[..., finished:, :].clone()
                buffer[..., rest:, :] = 0


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
        self.held: Tensor | None = None
        self.first = 0  # row number of the first row held

    def resized(self, top: int, bottom: int) -> Tensor:
        """Rows `top` to `bottom` of the result, (C, bottom - top, width); they are to be asked for in order."""
        low, share = (values[top:bottom] for values in places(self.source[0], self.target[0]))
        high = (low + 1).clamp(max=self.source[0] - 1)
        self._hold(int(low[0]), int(high[-1]))
        low, high = ((rows - self.first).to(self.held.device) for rows in (low, high))
        rows = torch.lerp(self.held[:, low], self.held[:, high], share.to(self.held).view(-1, 1))
        if self.source[1] == self.target[1]:
            return rows
        return F.interpolate(rows, self.target[1], mode="linear", align_corners=False)

    def _hold(self, first: int, last: int) -> None:
        """Take strips until the last row is there; forget the rows before the first."""
        parts = [] if self.held is None else [self.held]
        while self.first + sum(part.size(1) for part in parts) <= last:
            parts.append(next(self.strips))
        self.held, self.first = torch.cat(parts, dim=1)[:, first - self.first :], first
