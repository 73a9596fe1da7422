"""Cross entropy of logits without storing log-probabilities.

`log_softmax` followed by `nll_loss` stores the log-probabilities in float32 and allocates two gradients of the same
size. This module stores only the logits, in their own dtype. The forward and the backward pass compute the softmax in
blocks. The gradient is softmax minus one-hot target (Bishop, "Pattern Recognition and Machine Learning", 4.109).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Number of logits per block. On a CPU, a block has 2 MiB in float32, which fit into the caches.
BLOCK = {"cpu": 2**19, "other": 2**26}


class _NLLSum(torch.autograd.Function):
    """Autograd function of `nll_sum`."""

    @staticmethod
    def forward(ctx, logits: Tensor, label: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
        kind = torch.promote_types(logits.dtype, torch.float32)
        counted = label != ignore_index
        true = label.masked_fill(~counted, 0)
        importance = counted.to(kind) if weight is None else weight.to(kind)[true] * counted
        total = logits.new_zeros((), dtype=kind)
        for images, rows in _blocks(logits):
            index, own = (values[images, rows].unsqueeze(1) for values in (true, importance))
            log_probs = logits[images, :, rows].to(kind).log_softmax(dim=1)
            total -= (log_probs.gather(1, index) * own).sum()
        ctx.save_for_backward(logits, true, importance)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, true, importance = ctx.saved_tensors
        # Multiply in float32 and round only the product: class weights and loss scales can be very large or small, and
        # a rounding error in a factor that is equal for all pixels would scale the whole gradient.
        factor = importance * upstream
        gradient = torch.empty_like(logits)
        for images, rows in _blocks(logits):
            index, own = (values[images, rows].unsqueeze(1) for values in (true, factor))
            residual = logits[images, :, rows].to(factor.dtype).softmax(dim=1)
            residual.scatter_add_(1, index, residual.new_full((), -1).expand_as(index))
            gradient[images, :, rows] = residual.mul_(own)
        return gradient, None, None, None


def nll_sum(logits: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int = -1) -> Tensor:
    """Return the negative log-likelihood of the labels, summed over the labelled pixels.

    Up to rounding, this equals `F.cross_entropy(logits, label, weight, ignore_index=ignore_index, reduction="sum")`.

    Args:
        logits: (N, C, H, W) logits.
        label: (N, H, W) int64 class indices.
        weight: (C,) class weights; None gives all classes weight 1.
        ignore_index: label of ignored pixels.

    Returns:
        A scalar tensor, float64 for float64 logits, else float32.
    """
    return _NLLSum.apply(logits, label, weight, ignore_index)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (slice of images, slice of rows) for every block of the logits (N, C, H, W)."""
    count, classes, height, width = logits.shape
    most = BLOCK.get(logits.device.type, BLOCK["other"])
    rows = max(1, min(height, most // max(1, classes * width)))
    images = max(1, most // max(1, classes * height * width))
    for first in range(0, count, images):
        for top in range(0, height, rows):
            yield slice(first, first + images), slice(top, top + rows)
