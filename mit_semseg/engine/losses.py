"""Losses over log-probabilities, cross entropy also over raw class scores; all leave ignored pixels out, work without a
copy to the host, and are zero, with gradients, for a batch without a single labelled pixel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import at_least_float32
from .cross_entropy import likelihood_sum

LOSSES = ("ce", "ohem", "dice", "lovasz", "ce+dice", "ce+lovasz")


class MaskedNLLLoss(nn.Module):
    """Negative log-likelihood averaged over the labelled pixels, weighted by their classes' weights if there are any.

    Equal to `nn.CrossEntropyLoss` on logits, but a batch without a single labelled pixel gives zero, with gradients,
    instead of NaN.

    Args:
        ignore_index: label of pixels that do not count.
        weight: (C,) of the classes.
        label_smoothing: share of the target that is spread over all classes, in 0..1 (Szegedy et al., 2016).
    """

    def __init__(
        self, ignore_index: int = -1, *, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0
    ):
        super().__init__()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)
        self._weight = weight  # stays on the host, where labels are counted

    def of_logits(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar loss, without the log-probabilities in memory.

        Args:
            logits: (N, C, H, W) raw class scores.
            label: (N, H, W) int64.
        """
        if self.label_smoothing:
            return self(F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32)), label)
        return likelihood_sum(logits, label, self.weight, self.ignore_index) / _or_one(self.normalizer(label))

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            log_probs: (N, C, H, W).
            label: (N, H, W) int64.
        """
        log_probs = at_least_float32(log_probs)
        labelled = label != self.ignore_index
        weight = None if self.weight is None else self.weight.to(log_probs)
        # `F.nll_loss` has no deterministic CUDA implementation, `gather` has one.
        known = label.where(labelled, 0)
        chosen = log_probs.gather(1, known.unsqueeze(1)).squeeze(1).where(labelled, 0)
        total = -(chosen if weight is None else chosen * weight[known]).sum()
        count = self.normalizer(label)
        if self.label_smoothing:
            # Every class gets an equal fraction of the target, times its class weight, as in PyTorch. A product and a
            # sum, no matrix product: autocast would compute that in 16 bits.
            spread = (log_probs if weight is None else log_probs * weight.view(-1, 1, 1)).mean(1)
            total = (1 - self.label_smoothing) * total - self.label_smoothing * (spread * labelled).sum()
            total = total * (count > 0)  # all labelled pixels are of classes of weight 0: nothing to learn
        return total / _or_one(count)

    def normalizer(self, label: Tensor) -> Tensor:
        """What the sum over the pixels is divided by: how much a batch counts beside others. A scalar.

        Args:
            label: (N, H, W) int64.
        """
        labelled = label != self.ignore_index
        if self.weight is None:
            return labelled.sum()
        weight = self.weight if self.weight.device == label.device else self._weight.to(label.device)
        return (weight[label.where(labelled, 0)] * labelled).sum()


class OhemLoss(nn.Module):
    """Negative log-likelihood averaged over the hard pixels: those whose true class has at most a probability.

    Online hard example mining (Shrivastava et al., 2016). Where fewer pixels are hard than are to be kept, the hardest
    ones are taken; where fewer are labelled, all of them.

    Args:
        threshold: probability of the true class up to which a pixel counts as hard.
        min_kept: pixels kept at least, of a batch of one device.
        ignore_index, weight, label_smoothing: as of `MaskedNLLLoss`.
    """

    def __init__(self, threshold: float = 0.7, min_kept: int = 100_000, *, ignore_index: int = -1, **likelihood):
        super().__init__()
        self.threshold, self.min_kept, self.ignore_index = threshold, min_kept, ignore_index
        self.likelihood = MaskedNLLLoss(ignore_index, **likelihood)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Scalar loss; arguments as of `MaskedNLLLoss`."""
        with torch.no_grad():
            labelled = label != self.ignore_index
            true = log_probs.gather(1, label.where(labelled, 0).unsqueeze(1)).squeeze(1).exp()
            # Ignored pixels are easier than any labelled one: if they are among the first k, all labelled ones are.
            true = true.where(labelled, 2)
            # `kthvalue` has no deterministic CUDA implementation.
            hardest = true.flatten().topk(min(self.min_kept, true.numel()), largest=False, sorted=False).values
            limit = hardest.max().clamp(min=self.threshold)
            hard = torch.where(true <= limit, label, self.ignore_index)
        return self.likelihood(log_probs, hard)


class DiceLoss(nn.Module):
    """One minus the soft Dice coefficient, averaged over the classes that are in the label.

    Milletari et al., "V-Net", 2016, with plain sums in the denominator: 2 sum(p y) / (sum(p) + sum(y)), over all
    labelled pixels of the batch. Rare classes count as much as frequent ones.

    Args:
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Scalar loss in 0..1; arguments as of `MaskedNLLLoss`."""
        labelled = (label != self.ignore_index).unsqueeze(1)
        probs = log_probs.exp() * labelled
        target = torch.zeros_like(probs).scatter_(1, label.unsqueeze(1).where(labelled, 0), 1) * labelled
        axes = (0, 2, 3)
        sums = target.sum(axes)
        dice = 2 * (probs * target).sum(axes) / (probs.sum(axes) + sums).clamp(min=1e-12)
        return _mean_over_present(1 - dice, sums > 0)


class LovaszLoss(nn.Module):
    """Lovász-softmax, a surrogate of one minus the mean IoU of the classes that are in the label.

    Berman, Rannen Triki & Blaschko, "The Lovász-Softmax loss", 2018, over all labelled pixels of the batch.

    Args:
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Scalar loss in 0..1; arguments as of `MaskedNLLLoss`."""
        labelled = label.flatten() != self.ignore_index
        log_probs = at_least_float32(log_probs)  # 16 bits cannot count pixels
        losses, present = [], []
        for number in range(log_probs.size(1)):  # one class at a time: sorting all at once needs many times the memory
            truth = ((label.flatten() == number) & labelled).to(log_probs)
            # An ignored pixel makes no error, comes last, and weighs nothing there.
            errors = (truth - log_probs[:, number].flatten().exp()).abs() * labelled
            errors, order = errors.sort(descending=True)
            losses.append((errors * _jaccard_gradient(truth[order])).sum())
            present.append(truth.sum() > 0)
        return _mean_over_present(torch.stack(losses), torch.stack(present))


def _jaccard_gradient(truth: Tensor) -> Tensor:
    """Growth of the Jaccard loss (one minus IoU) with every further error, hardest first: algorithm 1 of the paper."""
    # Of integers: a cumulative sum of floats has no deterministic CUDA implementation.
    total, hits = truth.sum(), truth.long().cumsum(0).to(truth)
    position = torch.arange(1, len(truth) + 1, device=truth.device, dtype=truth.dtype)
    loss = 1 - (total - hits) / _or_one(total + position - hits)
    return torch.diff(loss, prepend=loss.new_zeros(1))


class SumLoss(nn.Module):
    """The sum of several losses."""

    def __init__(self, *losses: nn.Module):
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Scalar loss; arguments as of `MaskedNLLLoss`."""
        return sum(loss(log_probs, label) for loss in self.losses)

    def normalizer(self, label: Tensor) -> Tensor:
        """How much a batch counts beside others, by the first loss; see `weight_of`."""
        return weight_of(self.losses[0], label)


def build_loss(
    name: str = "ce",
    *,
    class_weights: Sequence[float] = (),
    label_smoothing: float = 0.0,
    ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000,
) -> nn.Module:
    """A loss by its name.

    Args:
        name: one of `LOSSES`; a plus adds two up.
        class_weights, label_smoothing: of cross entropy (`ce`, `ohem`); () weighs all classes the same.
        ohem_threshold, ohem_min_kept: see `OhemLoss`.

    Raises:
        ValueError: another name.
    """
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}; the losses are {', '.join(LOSSES)}")
    options = {"weight": class_weights or None, "label_smoothing": label_smoothing}
    parts = {
        "ce": lambda: MaskedNLLLoss(**options),
        "ohem": lambda: OhemLoss(ohem_threshold, ohem_min_kept, **options),
        "dice": DiceLoss,
        "lovasz": LovaszLoss,
    }
    losses = [parts[part]() for part in name.split("+")]
    return losses[0] if len(losses) == 1 else SumLoss(*losses)


def weight_of(loss: nn.Module | None, label: Tensor) -> Tensor:
    """How much a batch counts beside those of other devices: a scalar.

    A loss with a `normalizer` is then the same however a batch is shared out. Others (hard pixels, Dice, Lovász) are of
    each device's batch, and count by their labelled pixels.

    Args:
        loss: any loss over (log-probabilities, labels).
        label: (N, H, W) int64, negative values ignored.
    """
    normalizer = getattr(loss, "normalizer", None)
    return normalizer(label) if normalizer else (label >= 0).sum()


def _or_one(count: Tensor) -> Tensor:
    """A divisor: of nothing at all it is one."""
    return torch.where(count > 0, count, 1)


def _mean_over_present(values: Tensor, present: Tensor) -> Tensor:
    return (values * present).sum() / _or_one(present.sum())
