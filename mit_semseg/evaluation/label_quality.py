"""Label quality: images whose labels disagree with confident predictions.

Lad and Mueller, "Estimating label quality and errors in semantic segmentation data via any model", 2023.
"""

import torch
from torch import Tensor

SOFTNESS = 0.1  # temperature of the soft minimum, as in the paper


def label_probability(probabilities: Tensor, label: Tensor) -> Tensor:
    """Return the probability of the given label at every pixel (h, w) float32; NaN where the label is ignored.

    `probabilities`: (C, h, w); `label`: (h, w) int64 class indices, negative where ignored.
    """
    given = probabilities.gather(0, label.clamp(min=0)[None])[0].float()
    return torch.where(label >= 0, given, torch.nan)


def label_quality(given: Tensor) -> Tensor:
    """Return the soft minimum over the pixels of the result of `label_probability`, a scalar tensor in 0..1.

    Pixels with a small probability have the largest weights, exp(-probability / `SOFTNESS`). The result is NaN if no
    pixel is labelled.
    """
    weights = torch.where(given.isnan(), 0, (-given / SOFTNESS).exp())
    return (weights * given.nan_to_num()).sum() / weights.sum()
