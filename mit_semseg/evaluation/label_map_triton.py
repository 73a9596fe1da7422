"""Compute a label map in one Triton kernel: resize logits, apply softmax, average over views, take the argmax.

A view is one scale, flipped or not. Every Triton program computes `PIXELS` pixels of a row in a loop over blocks of
classes. With several views, an additional first loop computes the softmax denominators.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

CLASSES, PIXELS = 16, 64  # block size of a Triton program; a block of this size fits into registers


@triton.jit
def _neighbors(sides, lows, weights, view, positions, count):
    """Return the lower and upper source index of each output position, and the weight of the upper one."""
    low = tl.load(lows + view * count + positions, mask=positions < count, other=0)
    weight = tl.load(weights + view * count + positions, mask=positions < count, other=0.0)
    return low, tl.minimum(low + 1, tl.load(sides + view) - 1), weight


@triton.jit
def _resized(
    logits, starts, heights, widths, lows_y, weights_y, lows_x, weights_x, view, y, xs, classes, C, H, W
):  # fmt: skip
    """Return the resized logits (classes, pixels) of a block; -inf for class indices >= C."""
    above, below, weight_y = _neighbors(heights, lows_y, weights_y, view, y, H)
    left, right, weight_x = _neighbors(widths, lows_x, weights_x, view, xs, W)
    width, inside = tl.load(widths + view), (classes < C)[:, None]
    place = logits + tl.load(starts + view) + classes[:, None]
    a = tl.load(place + ((above * width + left) * C)[None, :], mask=inside, other=0.0)
    b = tl.load(place + ((above * width + right) * C)[None, :], mask=inside, other=0.0)
    c = tl.load(place + ((below * width + left) * C)[None, :], mask=inside, other=0.0)
    d = tl.load(place + ((below * width + right) * C)[None, :], mask=inside, other=0.0)
    top, bottom = a + (b - a) * weight_x[None, :], c + (d - c) * weight_x[None, :]
    return tl.where(inside, top + (bottom - top) * weight_y, -float("inf"))


@triton.jit
def _kernel(
    logits, starts, heights, widths, lows_y, weights_y, lows_x, weights_x, labels, C, H, W,
    VIEWS: tl.constexpr, SLOTS: tl.constexpr, CLASSES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    y = tl.program_id(0)
    xs = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    slots = tl.arange(0, SLOTS)[:, None]
    divisors = tl.zeros((SLOTS, PIXELS), dtype=tl.float32)  # logarithm of softmax denominators, one row per view
    if VIEWS > 1:
        for view in range(VIEWS):
            largest = tl.full((PIXELS,), -float("inf"), dtype=tl.float32)
            total = tl.zeros((PIXELS,), dtype=tl.float32)
            for first in range(0, C, CLASSES):
                classes = first + tl.arange(0, CLASSES)
                x = _resized(
                    logits, starts, heights, widths, lows_y, weights_y, lows_x, weights_x, view, y, xs, classes, C, H, W
                )  # fmt: skip
                new = tl.maximum(largest, tl.max(x, axis=0))
                total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[None, :]), axis=0)
                largest = new
            divisors = tl.where(slots == view, (largest + tl.log(total))[None, :], divisors)
    best = tl.full((PIXELS,), -float("inf"), dtype=tl.float32)
    label = tl.zeros((PIXELS,), dtype=tl.int32)
    for first in range(0, C, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        score = tl.zeros((CLASSES, PIXELS), dtype=tl.float32)
        for view in range(VIEWS):
            x = _resized(
                logits, starts, heights, widths, lows_y, weights_y, lows_x, weights_x, view, y, xs, classes, C, H, W
            )  # fmt: skip
            if VIEWS > 1:
                divisor = tl.sum(tl.where(slots == view, divisors, 0.0), axis=0)
                x = tl.exp(x - divisor[None, :])
            score += x
        score = tl.where((classes < C)[:, None], score, -float("inf"))
        largest = tl.max(score, axis=0)
        number = tl.min(
            tl.where(score == largest[None, :], classes[:, None], C), axis=0
        )  # the first class with the largest score
        label = tl.where(largest > best, number, label)
        best = tl.maximum(best, largest)
    tl.store(labels + y.to(tl.int64) * W + xs, label.to(tl.int64), mask=xs < W)


def label_map_triton(logits: Sequence[Tensor], size: tuple[int, int], neighbors: Sequence[tuple]) -> Tensor:
    """Return the class with the largest mean probability at every pixel, see `label_map.label_map_from_logits`.

    Args:
        logits: float32 tensors (C, h, w), one per view, all on one GPU.
        size: (height, width) of the image.
        neighbors: for every view, the results of `bilinear_neighbors` for rows and for columns.

    Returns:
        (height, width) int64.
    """
    (height, width), device = size, logits[0].device
    flat = torch.cat([x.permute(1, 2, 0).reshape(-1) for x in logits])  # the class index varies fastest
    starts = torch.tensor([0, *accumulate(x.numel() for x in logits)])[:-1].to(device)
    sides = torch.tensor([x.shape[1:] for x in logits], dtype=torch.int32).T.contiguous().to(device)
    lows, weights = (
        [torch.stack([own[axis][part] for own in neighbors]).to(device, kind) for axis in range(2)]
        for part, kind in enumerate((torch.int32, torch.float32))
    )
    labels = torch.empty(size, dtype=torch.int64, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _kernel[(height, triton.cdiv(width, PIXELS))](  # rows are first, because the second dimension is at most 65,535
            flat, starts, *sides, lows[0], weights[0], lows[1], weights[1], labels, len(logits[0]), height, width,
            VIEWS=len(logits), SLOTS=triton.next_power_of_2(len(logits)), CLASSES=CLASSES, PIXELS=PIXELS,
        )  # fmt: skip
    return labels
