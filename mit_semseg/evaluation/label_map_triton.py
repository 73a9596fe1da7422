"""Compute a label map in one Triton kernel: resize logits, apply softmax, average over views, take the argmax.

A view is one scale, flipped or not. Every Triton program computes `PIXELS` pixels of a row in a loop over blocks of
classes. With several views, an additional first loop computes the softmax denominators.

The logits are stored as a table (positions, STRIDE), in which STRIDE is the number of classes rounded up to a multiple
of 8. The rows of the table are therefore aligned, and a thread can load 16 bytes at once.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lib.utils import cache_tensors
from .label_map import bilinear_neighbors, label_dtype

CLASSES, PIXELS = 16, 64  # block size of a Triton program; a block of this size fits into registers


@triton.jit
def _resized(logits, rows, row_weights, columns, column_weights, view, y, xs, classes, C, STRIDE, H, W):
    """Return the resized logits (classes, pixels) of a block; -inf for class indices >= C."""
    above, below = tl.load(rows + 2 * view * H + y), tl.load(rows + (2 * view + 1) * H + y)
    left = tl.load(columns + 2 * view * W + xs, mask=xs < W, other=0)
    right = tl.load(columns + (2 * view + 1) * W + xs, mask=xs < W, other=0)
    weight_y = tl.load(row_weights + view * H + y)
    weight_x = tl.load(column_weights + view * W + xs, mask=xs < W, other=0.0)
    stored, place = (classes < STRIDE)[:, None], logits + classes[:, None]
    a = tl.load(place + ((above + left) * STRIDE)[None, :], mask=stored, other=0.0)
    b = tl.load(place + ((above + right) * STRIDE)[None, :], mask=stored, other=0.0)
    c = tl.load(place + ((below + left) * STRIDE)[None, :], mask=stored, other=0.0)
    d = tl.load(place + ((below + right) * STRIDE)[None, :], mask=stored, other=0.0)
    top, bottom = a + (b - a) * weight_x[None, :], c + (d - c) * weight_x[None, :]
    return tl.where((classes < C)[:, None], top + (bottom - top) * weight_y, -float("inf"))


@triton.jit
def _kernel(
    logits, rows, row_weights, columns, column_weights, labels, H, W, C: tl.constexpr, STRIDE: tl.constexpr,
    VIEWS: tl.constexpr, SLOTS: tl.constexpr, CLASSES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    y = tl.program_id(0)
    xs = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    slots = tl.arange(0, SLOTS)[:, None]
    # Largest logit and softmax denominator of each view. The sum of the largest logit and the logarithm of the
    # denominator would lose digits of the latter.
    maxima = tl.zeros((SLOTS, PIXELS), dtype=tl.float32)
    divisors = tl.zeros((SLOTS, PIXELS), dtype=tl.float32)
    if VIEWS > 1:
        for view in range(VIEWS):
            largest = tl.full((PIXELS,), -float("inf"), dtype=tl.float32)
            total = tl.zeros((PIXELS,), dtype=tl.float32)
            for first in range(0, C, CLASSES):
                classes = first + tl.arange(0, CLASSES)
                x = _resized(
                    logits, rows, row_weights, columns, column_weights, view, y, xs, classes, C, STRIDE, H, W
                )  # fmt: skip
                new = tl.maximum(largest, tl.max(x, axis=0))
                total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[None, :]), axis=0)
                largest = new
            maxima = tl.where(slots == view, largest[None, :], maxima)
            divisors = tl.where(slots == view, total[None, :], divisors)
    best = tl.full((PIXELS,), -float("inf"), dtype=tl.float32)
    label = tl.zeros((PIXELS,), dtype=tl.int32)
    for first in range(0, C, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        score = tl.zeros((CLASSES, PIXELS), dtype=tl.float32)
        for view in range(VIEWS):
            x = _resized(
                logits, rows, row_weights, columns, column_weights, view, y, xs, classes, C, STRIDE, H, W
            )  # fmt: skip
            if VIEWS > 1:
                largest = tl.sum(tl.where(slots == view, maxima, 0.0), axis=0)
                divisor = tl.sum(tl.where(slots == view, divisors, 0.0), axis=0)
                x = tl.exp(x - largest[None, :]) / divisor[None, :]
            score += x
        score = tl.where((classes < C)[:, None], score, -float("inf"))
        largest = tl.max(score, axis=0)
        number = tl.min(
            tl.where(score == largest[None, :], classes[:, None], C), axis=0
        )  # the first class with the largest score
        label = tl.where(largest > best, number, label)
        best = tl.maximum(best, largest)
    tl.store(labels + y.to(tl.int64) * W + xs, label.to(labels.dtype.element_ty), mask=xs < W)


def label_map_triton(logits: Sequence[Tensor], size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return the class with the largest mean probability at every pixel, see `label_map.label_map_from_logits`.

    Args:
        logits: float32 tensors (C, h, w), one per view, all on one GPU.
        size: (height, width) of the image.
        align_corners: argument of `F.interpolate` for resizing the logits.

    Returns:
        (height, width) with the dtype `label_dtype(C)`.
    """
    (height, width), device, classes = size, logits[0].device, len(logits[0])
    shapes = tuple((x.size(1), x.size(2)) for x in logits)
    table = logits[0].new_empty(sum(h * w for h, w in shapes), triton.cdiv(classes, 8) * 8)
    for part, x in zip(table.split([h * w for h, w in shapes]), logits, strict=True):
        part[:, :classes] = x.flatten(1).T
    table[:, classes:] = 0
    labels = torch.empty(size, dtype=label_dtype(classes), device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _kernel[(height, triton.cdiv(width, PIXELS))](  # rows are first, because the second dimension is at most 65,535
            table, *_source_offsets(shapes, size, align_corners, device), labels, height, width, C=classes,
            STRIDE=table.size(1), VIEWS=len(logits), SLOTS=triton.next_power_of_2(len(logits)), CLASSES=CLASSES,
            PIXELS=PIXELS,
        )  # fmt: skip
    return labels


@cache_tensors
def _source_offsets(
    shapes: Sequence[tuple[int, int]], size: tuple[int, int], align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return row offsets, row weights, columns and column weights of V views, see `bilinear_neighbors`.

    Row offsets (V, 2, H) and columns (V, 2, W) are int64; weights are (V, H) and (V, W). Row offset = position of the
    first logits of the view + source row * width of the view. Row offset + column is a position in the table of logits.
    """
    rows, row_weights, columns, column_weights, first = [], [], [], [], 0
    for height, width in shapes:
        low, high, weight = bilinear_neighbors(height, size[0], align_corners, torch.float32, device)
        rows.append(torch.stack([low, high]) * width + first)
        row_weights.append(weight)
        low, high, weight = bilinear_neighbors(width, size[1], align_corners, torch.float32, device)
        columns.append(torch.stack([low, high]))
        column_weights.append(weight)
        first += height * width
    return torch.stack(rows), torch.stack(row_weights), torch.stack(columns), torch.stack(column_weights)
