"""Losses over log-probabilities; all leave ignored pixels out."""

import torch.nn.functional as F
from torch import Tensor, nn


class MaskedNLLLoss(nn.Module):
    """Negative log-likelihood averaged over the labelled pixels.

    Equal to `nn.NLLLoss(ignore_index)`, but a batch without a single labelled pixel gives zero, with gradients, instead
    of NaN.

    Args:
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            log_probs: (N, C, H, W).
            label: (N, H, W) int64.
        """
        total = F.nll_loss(log_probs, label, ignore_index=self.ignore_index, reduction="sum")
        return total / (label != self.ignore_index).sum().clamp(min=1)
