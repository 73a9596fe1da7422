"""Cross entropy from class scores, without the log-probabilities of all classes in memory.

`log_softmax` followed by `nll_loss` keeps the log-probabilities, and makes a gradient of them and one of the scores,
all in float32. Here the softmax is made block by block in the forward pass, and all that is kept is the gradient, in
the type of the scores: the softmax less one at the true class (Bishop, "Pattern Recognition and Machine Learning",
4.109).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores worked on at a time: 2 MiB of float32 on a CPU, where they stay in the caches.
BLOCK = {"cpu": 2**19, "other": 2**26}


class _LikelihoodSum(torch.autograd.Function):
    """`apply(logits (N, C, H, W), label (N, H, W), weight (C,) or None, ignore_index)`: a scalar."""

    @staticmethod
    def forward(ctx, logits: Tensor, label: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
        kind = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        counted = label != ignore_index
        true = label.masked_fill(~counted, 0)
        importance = counted.to(kind) if weight is None else weight.to(kind)[true] * counted
        total = logits.new_zeros((), dtype=kind)
        for pictures, rows in _blocks(logits):
            index, own = (values[pictures, rows].unsqueeze(1) for values in (true, importance))
            log_probs = logits[pictures, :, rows].to(kind).log_softmax(dim=1)
            total -= (log_probs.gather(1, index) * own).sum()
            if gradient is not None:
                residual = log_probs.exp_()
                residual.scatter_add_(1, index, residual.new_full((), -1).expand_as(index))
                gradient[pictures, :, rows] = residual.mul_(own)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def likelihood_sum(logits: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int = -1) -> Tensor:
    """Negative log-likelihood of the true classes, added up over the labelled pixels.

    The same as `F.cross_entropy(logits, label, weight, ignore_index=ignore_index, reduction="sum")`, up to rounding.

    Args:
        logits: (N, C, H, W) raw class scores.
        label: (N, H, W) int64.
        weight: (C,) of the classes; None weighs all the same.
        ignore_index: label of pixels that do not count.

    Returns:
        A scalar, float32 at least.
    """
    return _LikelihoodSum.apply(logits, label, weight, ignore_index)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pictures and rows that are worked on together."""
    count, classes, height, width = logits.shape
    most = BLOCK.get(logits.device.type, BLOCK["other"])
    rows = max(1, min(height, most // max(1, classes * width)))
    pictures = max(1, most // max(1, classes * height * width))
    for first in range(0, count, pictures):
        for top in range(0, height, rows):
            yield slice(first, first + pictures), slice(top, top + rows)
