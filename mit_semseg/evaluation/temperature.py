"""Temperature scaling, which calibrates class probabilities without changing the order of the logits.

Guo et al., "On Calibration of Modern Neural Networks", 2017.
"""

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from ..dataset import ValDataset
from ..dataset.loader import worker_errors
from .calibration import Reliability, calibration_counts
from .evaluator import LoadOptions, read_items
from .inference import Predictor
from .label_map import sample_positions, sampled_logits

TEMPERATURES = 0.05, 20.0  # range of temperatures that are tried


def sample_logits(
    predictor: Predictor, dataset: ValDataset, pixels: int, loading: LoadOptions | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return the logits of randomly chosen labelled pixels, and their labels, for `fit_temperature`, on the CPU.

    Args:
        predictor: network prepared for inference without sliding windows.
        dataset: validation set.
        pixels: maximum number of pixels per image.
    """
    logits, labels, align_corners = [], [], predictor.network.align_corners
    with worker_errors():
        for item in read_items(dataset, predictor.device, loading):
            if "error" in item:
                continue
            size = tuple(item["img_ori"].shape[:2])
            rows, columns = sample_positions(size)
            label = item["seg_label"][0, rows.start :: rows.step, columns.start :: columns.step].flatten()
            rng = np.random.default_rng(zlib.crc32(os.fsencode(item["info"])))  # does not depend on shards
            labelled = rng.permutation(np.flatnonzero(label.numpy() >= 0))
            chosen = torch.from_numpy(labelled[:pixels])
            sampled = [sampled_logits(x, size, align_corners=align_corners) for x in predictor.logits(item)]
            logits.append([x.flatten(1)[:, chosen.to(x.device)].float().cpu() for x in sampled])
            labels.append(label[chosen])
    return [torch.cat(parts, dim=1) for parts in zip(*logits, strict=True)], torch.cat([torch.empty(0).long(), *labels])


@dataclass(frozen=True)
class Temperature:
    """Result of `fit_temperature`: the temperature, and NLL and expected calibration error before and after."""

    value: float
    nll: tuple[float, float]
    error: tuple[float, float]
    pixels: int


def fit_temperature(logits: Sequence[Tensor], label: Tensor) -> Temperature:
    """Find the temperature that minimizes the negative log-likelihood of labelled pixels.

    Probabilities are the mean over all scales of softmax(logits / temperature).

    Args:
        logits: one tensor (C, M) per scale and flip, for M pixels.
        label: (M,) int64 class indices.
    """

    def probabilities(temperature: float) -> Tensor:
        return sum((x / temperature).softmax(0) for x in logits) / len(logits)

    def nll(temperature: float) -> float:
        if len(logits) == 1:
            return float(F.cross_entropy((logits[0] / temperature).T, label))
        likelihood = probabilities(temperature).gather(0, label[None])[0]
        return float(-likelihood.clamp_(min=1e-38).log_().double().mean())

    def error(temperature: float) -> float:
        counts = calibration_counts(probabilities(temperature)[:, None], label[None])
        return Reliability.from_counts(counts.numpy()).error

    bounds = tuple(map(math.log, TEMPERATURES))
    found = minimize_scalar(lambda x: nll(math.exp(x)), bounds=bounds, method="bounded", options={"xatol": 1e-4})
    value = math.exp(found.x)
    return Temperature(value, (nll(1.0), nll(value)), (error(1.0), error(value)), len(label))
