"""Losses of log-probabilities (N, C, H, W) and int64 labels (N, H, W); cross entropy also accepts logits.

A loss is a scalar tensor, ignores pixels with label `ignore_index`, and does not synchronize with the device. For a
batch without labelled pixels, the loss and its gradients are zero.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.builder import lookup
from ..models.layers import at_least_float32
from .cross_entropy import nll_sum


class MaskedNLLLoss(nn.Module):
    """Negative log-likelihood, averaged over the labelled pixels.

    The loss equals `nn.CrossEntropyLoss` of the logits, but is 0 instead of NaN for a batch without labelled pixels.

    Args:
        weight: (C,) class weights; None gives all classes weight 1.
        label_smoothing: fraction of the target probability given to all classes equally, 0..1 (Szegedy et al., 2016).
    """

    def __init__(
        self, ignore_index: int = -1, *, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0
    ):
        super().__init__()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)
        self._host_weight = weight  # for labels on the CPU, see `normalizer`

    def of_logits(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of logits. The log-probabilities (N, C, H, W) are allocated only for label smoothing."""
        if self.label_smoothing:
            return self(F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32)), label)
        return nll_sum(logits, label, self.weight, self.ignore_index) / _nonzero(self.normalizer(label))

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        log_probs = at_least_float32(log_probs)
        labelled = label != self.ignore_index
        weight = None if self.weight is None else self.weight.to(log_probs)
        # `gather` has a deterministic CUDA implementation, but `F.nll_loss` has none.
        target = label.where(labelled, 0)
        chosen = log_probs.gather(1, target.unsqueeze(1)).squeeze(1).where(labelled, 0)
        total = -(chosen if weight is None else chosen * weight[target]).sum()
        count = self.normalizer(label)
        if self.label_smoothing:
            # As in PyTorch, the class weights also multiply the smoothed target. A matrix product is not used,
            # because autocast would compute matrix products in float16 or bfloat16.
            smooth = (log_probs if weight is None else log_probs * weight.view(-1, 1, 1)).mean(1)
            total = (1 - self.label_smoothing) * total - self.label_smoothing * (smooth * labelled).sum()
            total = total * (count > 0)  # 0 if all labelled pixels have class weight 0
        return total / _nonzero(count)

    def normalizer(self, label: Tensor) -> Tensor:
        """Return the sum of class weights over the labelled pixels, by which the loss of a batch is divided."""
        labelled = label != self.ignore_index
        if self.weight is None:
            return labelled.sum()
        weight = self.weight if self.weight.device == label.device else self._host_weight.to(label.device)
        return (weight[label.where(labelled, 0)] * labelled).sum()


class OhemLoss(nn.Module):
    """Negative log-likelihood, averaged over the hard pixels (online hard example mining, Shrivastava et al., 2016).

    Args:
        threshold: a pixel is hard if the network gives its label a probability of at most `threshold`.
        min_kept: minimum number of pixels used per batch; if fewer pixels are hard, the hardest `min_kept` are used.
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
            probs = probs.where(labelled, 2)  # above 1, so that `topk` selects ignored pixels last
            # `topk` has a deterministic CUDA implementation, but `kthvalue` has none.
            hardest = probs.flatten().topk(min(self.min_kept, probs.numel()), largest=False, sorted=False).values
            limit = hardest.max().clamp(min=self.threshold)
            hard = torch.where(probs <= limit, label, self.ignore_index)
        return self.nll(log_probs, hard)


class DiceLoss(nn.Module):
    """One minus the soft Dice coefficient 2 sum(p y) / (sum(p) + sum(y)), averaged over the classes in the label.

    See Milletari et al., "V-Net", 2016; the denominator here has no squares. p is the probability of a class and y is 1
    for the labelled class, else 0. Sums include all labelled pixels of the batch.
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
    """Lovász-Softmax loss, a surrogate for one minus the mean IoU over the classes in the label.

    See Berman, Rannen Triki & Blaschko, "The Lovász-Softmax loss", 2018. All labelled pixels of the batch are used.
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
    """Return the increase of the Jaccard loss per pixel (algorithm 1); `truth` must be sorted by descending error."""
    # Sum integers, because `cumsum` of floats has no deterministic CUDA implementation.
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
    """Return the loss with the given name.

    Args:
        name: a key of `LOSSES`.
        class_weights, label_smoothing: options of cross entropy, see `MaskedNLLLoss`; () gives all classes weight 1.
        ohem_threshold, ohem_min_kept: see `OhemLoss`.

    Raises:
        ValueError: the name is unknown.
    """
    nll = {"weight": class_weights or None, "label_smoothing": label_smoothing}
    return lookup(LOSSES, name, "loss")(nll, (ohem_threshold, ohem_min_kept))


def balanced_class_weights(counts: np.ndarray) -> tuple[float, ...]:
    """Return the class weights 1 / sqrt(f), where f is the fraction of the labelled pixels that have the class.

    The square root is a compromise between equal weights for all pixels and equal weights for all classes. The weight
    of classes without pixels is 1. `counts` (images, classes) is the number of pixels, see `dataset.class_counts`.
    """
    pixels, total = counts.sum(0), max(1, counts.sum())
    return tuple(np.sqrt(total / np.where(pixels > 0, pixels, total)).tolist())


def batch_weight(loss: nn.Module | None, label: Tensor) -> Tensor:
    """Return the weight (scalar tensor) of a batch in the mean loss over devices and ranks.

    The weight is `loss.normalizer(label)`, so that the mean does not depend on how images are distributed over devices.
    For losses without a method `normalizer` (OHEM, Dice, Lovász), the weight is the number of labelled pixels.

    Args:
        loss: loss from `build_loss`; None returns the number of labelled pixels.
        label: (N, H, W) int64, negative where ignored.
    """
    normalizer = getattr(loss, "normalizer", None)
    return normalizer(label) if normalizer else (label >= 0).sum()


def _nonzero(count: Tensor) -> Tensor:
    """Return 1 where `count` is 0, else `count`."""
    return torch.where(count > 0, count, 1)


def _mean_over_present(values: Tensor, present: Tensor) -> Tensor:
    return (values * present).sum() / _nonzero(present.sum())
