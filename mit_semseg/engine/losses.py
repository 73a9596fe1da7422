"""Losses over log-probabilities (N, C, H, W) and labels (N, H, W) int64; cross entropy also over logits.

All are scalars, ignore the pixels of `ignore_index`, do not synchronize with the device, and are zero, with gradients,
for a batch without labelled pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.builder import lookup
from ..models.layers import at_least_float32
from .cross_entropy import nll_sum


class MaskedNLLLoss(nn.Module):
    """Negative log-likelihood, averaged over the labelled pixels.

    Equals `nn.CrossEntropyLoss` of the logits, except that a batch without labelled pixels gives zero instead of NaN.

    Args:
        weight: (C,) class weights.
        label_smoothing: fraction of the target spread over all classes, 0..1 (Szegedy et al., 2016).
    """

    def __init__(
        self, ignore_index: int = -1, *, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0
    ):
        super().__init__()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)
        self._host_weight = weight  # labels are counted on the host

    def of_logits(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of logits without storing log-probabilities."""
        if self.label_smoothing:
            return self(F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32)), label)
        return nll_sum(logits, label, self.weight, self.ignore_index) / _nonzero(self.normalizer(label))

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        log_probs = at_least_float32(log_probs)
        labelled = label != self.ignore_index
        weight = None if self.weight is None else self.weight.to(log_probs)
        # `gather` has a deterministic CUDA implementation, `F.nll_loss` does not.
        target = label.where(labelled, 0)
        chosen = log_probs.gather(1, target.unsqueeze(1)).squeeze(1).where(labelled, 0)
        total = -(chosen if weight is None else chosen * weight[target]).sum()
        count = self.normalizer(label)
        if self.label_smoothing:
            # The smoothed target is multiplied by the class weights, as in PyTorch. A matrix product is not used,
            # because autocast would compute it in float16 or bfloat16.
            smooth = (log_probs if weight is None else log_probs * weight.view(-1, 1, 1)).mean(1)
            total = (1 - self.label_smoothing) * total - self.label_smoothing * (smooth * labelled).sum()
            total = total * (count > 0)  # all labelled pixels may have class weight 0
        return total / _nonzero(count)

    def normalizer(self, label: Tensor) -> Tensor:
        """Return the divisor of the loss of a batch: the sum of the weights of its labelled pixels."""
        labelled = label != self.ignore_index
        if self.weight is None:
            return labelled.sum()
        weight = self.weight if self.weight.device == label.device else self._host_weight.to(label.device)
        return (weight[label.where(labelled, 0)] * labelled).sum()


class OhemLoss(nn.Module):
    """Negative log-likelihood, averaged over the hard pixels (online hard example mining, Shrivastava et al., 2016).

    Args:
        threshold: a pixel is hard if the probability of its class is at most `threshold`.
        min_kept: minimum number of pixels per batch; if fewer are hard, the hardest `min_kept` pixels are used.
        ignore_index, weight, label_smoothing: see `MaskedNLLLoss`.
    """

    def __init__(self, threshold: float = 0.7, min_kept: int = 100_000, *, ignore_index: int = -1, **options):
        super().__init__()
        self.threshold, self.min_kept, self.ignore_index = threshold, min_kept, ignore_index
        self.nll = MaskedNLLLoss(ignore_index, **options)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            labelled = label != self.ignore_index
            probs = log_probs.gather(1, label.where(labelled, 0).unsqueeze(1)).squeeze(1).exp()
            probs = probs.where(labelled, 2)  # ignored pixels sort after all others
            # `topk` has a deterministic CUDA implementation, `kthvalue` does not.
            hardest = probs.flatten().topk(min(self.min_kept, probs.numel()), largest=False, sorted=False).values
            limit = hardest.max().clamp(min=self.threshold)
            hard = torch.where(probs <= limit, label, self.ignore_index)
        return self.nll(log_probs, hard)


class DiceLoss(nn.Module):
    """One minus the soft Dice coefficient 2 sum(p y) / (sum(p) + sum(y)), averaged over the classes in the label.

    Milletari et al., "V-Net", 2016, with sums instead of sums of squares in the denominator. Sums are over all labelled
    pixels of the batch.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        labelled = (label != self.ignore_index).unsqueeze(1)
        probs = log_probs.exp() * labelled
        target = torch.zeros_like(probs).scatter_(1, label.unsqueeze(1).where(labelled, 0), 1) * labelled
        axes = (0, 2, 3)
        sums = target.sum(axes)
        dice = 2 * (probs * target).sum(axes) / (probs.sum(axes) + sums).clamp(min=1e-12)
        return _mean_over_present(1 - dice, sums > 0)


class LovaszLoss(nn.Module):
    """Lovász-Softmax, a surrogate of one minus the mean IoU of the classes in the label.

    Berman, Rannen Triki & Blaschko, "The Lovász-Softmax loss", 2018, computed over all labelled pixels of the batch.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        labelled = label.flatten() != self.ignore_index
        log_probs = at_least_float32(log_probs)  # sums over pixels need more precision than 16-bit floats have
        losses, present = [], []
        for number in range(log_probs.size(1)):  # sorting all classes at once would need C times the memory
            truth = ((label.flatten() == number) & labelled).to(log_probs)
            # Ignored pixels have error 0, so they are last after sorting and do not contribute.
            errors = (truth - log_probs[:, number].flatten().exp()).abs() * labelled
            errors, order = errors.sort(descending=True)
            losses.append((errors * _jaccard_gradient(truth[order])).sum())
            present.append(truth.sum() > 0)
        return _mean_over_present(torch.stack(losses), torch.stack(present))


def _jaccard_gradient(truth: Tensor) -> Tensor:
    """Return the increase of the Jaccard loss (1 - IoU) per pixel, sorted by error (algorithm 1 of the paper)."""
    # Integers: `cumsum` of floats has no deterministic CUDA implementation.
    total, hits = truth.sum(), truth.long().cumsum(0).to(truth)
    position = torch.arange(1, len(truth) + 1, device=truth.device, dtype=truth.dtype)
    loss = 1 - (total - hits) / _nonzero(total + position - hits)
    return torch.diff(loss, prepend=loss.new_zeros(1))


class SumLoss(nn.Module):
    """Sum of several losses."""

    def __init__(self, *losses: nn.Module):
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        return sum(loss(log_probs, label) for loss in self.losses)

    def normalizer(self, label: Tensor) -> Tensor:
        return batch_weight(self.losses[0], label)


LOSSES = {
    "ce": lambda nll, ohem: MaskedNLLLoss(**nll),
    "ohem": lambda nll, ohem: OhemLoss(*ohem, **nll),
    "dice": lambda nll, ohem: DiceLoss(),
    "lovasz": lambda nll, ohem: LovaszLoss(),
    "ce+dice": lambda nll, ohem: SumLoss(MaskedNLLLoss(**nll), DiceLoss()),
    "ce+lovasz": lambda nll, ohem: SumLoss(MaskedNLLLoss(**nll), LovaszLoss()),
}


def build_loss(
    name: str = "ce",
    *,
    class_weights: Sequence[float] = (),
    label_smoothing: float = 0.0,
    ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000,
) -> nn.Module:
    """Return a loss by name.

    Args:
        name: a key of `LOSSES`.
        class_weights, label_smoothing: options of cross entropy, see `MaskedNLLLoss`; () for equal weights.
        ohem_threshold, ohem_min_kept: see `OhemLoss`.

    Raises:
        ValueError: unknown name.
    """
    nll = {"weight": class_weights or None, "label_smoothing": label_smoothing}
    return lookup(LOSSES, name, "loss")(nll, (ohem_threshold, ohem_min_kept))


def batch_weight(loss: nn.Module | None, label: Tensor) -> Tensor:
    """Return the scalar weight of a batch's loss in the mean over devices and ranks.

    The weight is `loss.normalizer(label)`. It makes the mean independent of the distribution of images over devices.
    For losses without this method (OHEM, Dice, Lovász) it is the number of labelled pixels.

    Args:
        loss: loss of (log-probabilities, labels).
        label: (N, H, W) int64, negative where ignored.
    """
    normalizer = getattr(loss, "normalizer", None)
    return normalizer(label) if normalizer else (label >= 0).sum()


def _nonzero(count: Tensor) -> Tensor:
    """Replace a divisor of 0 by 1."""
    return torch.where(count > 0, count, 1)


def _mean_over_present(values: Tensor, present: Tensor) -> Tensor:
    return (values * present).sum() / _nonzero(present.sum())
