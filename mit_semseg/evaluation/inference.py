"""From a network and a picture to a label map: several scales, mirrored, whole or window by window."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..models.layers import at_least_float32
from .label_map import label_map_from_logits, probability_strips
from .network import DEFAULT_INFERENCE, InferenceOptions, Model
from .sliding_window import score_strips

BATCHED = ("cuda",)  # devices on which several pictures at a time are faster than one after the other


def label_map(
    model: Model, item: dict, device: torch.device | str = "cpu", view: InferenceOptions = DEFAULT_INFERENCE
) -> np.ndarray:
    """The most probable class of every pixel.

    Args:
        model: a `SegmentationModule` in eval mode, whose class scores never have the picture's size; or any callable of
            the same form.
        item: of a `ValDataset` or `TestDataset`: `img_ori` (H, W, 3) and `img_data`, one tensor per scale.
        device: where the model is.
        view: mirrored, windows.

    Returns:
        (H, W) int64 class indices.
    """
    size = tuple(item["img_ori"].shape[:2])
    if view.window is None and hasattr(model, "logits"):
        logits = view_logits(model, item, device, view)
        return label_map_from_logits(logits, size, align_corners=model.align_corners).cpu().numpy()
    if view.window is None:
        return multi_scale_scores(model, item["img_data"], size, device, view).argmax(dim=0).cpu().numpy()
    strips = score_strips(model, item["img_data"], size, device, view)
    return np.concatenate([strip.argmax(dim=0).cpu().numpy() for strip in strips])


@torch.inference_mode()
def top_classes(
    model: Model, item: dict, top: int, device: torch.device | str = "cpu", view: InferenceOptions = DEFAULT_INFERENCE
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes of every pixel, without the probabilities of all in memory.

    Args:
        model, item, device, view: as of `label_map`.
        top: how many classes.

    Returns:
        Class indices (top, H, W) int64 and probabilities (top, H, W) float32, largest first.
    """
    size = tuple(item["img_ori"].shape[:2])
    if view.window is not None:
        strips = score_strips(model, item["img_data"], size, device, view)
    else:
        logits = view_logits(model, item, device, view)
        strips = probability_strips(logits, size, align_corners=model.align_corners)
    best = [strip.topk(top, dim=0) for strip in strips]
    return (
        np.concatenate([part.indices.cpu().numpy() for part in best], axis=1),
        np.concatenate([part.values.float().cpu().numpy() for part in best], axis=1),
    )


def label_maps(
    model: Model, items: Sequence[dict], device: torch.device | str = "cpu", view: InferenceOptions = DEFAULT_INFERENCE
) -> Iterator[np.ndarray]:
    """`label_map` of several items. On a GPU, pictures of one size that follow each other go through the network
    together, which may round differently; on a CPU that gains nothing.

    Args:
        model, device, view: as of `label_map`.
        items: as of `label_map`.
    """
    if torch.device(device).type not in BATCHED or view.window is not None or not hasattr(model, "logits"):
        yield from (label_map(model, item, device, view) for item in items)
        return
    for _, group in groupby(items, key=lambda item: [x.shape for x in item["img_data"]]):
        group = list(group)
        scales = [torch.cat(same) for same in zip(*(item["img_data"] for item in group), strict=True)]
        logits = _all_logits(model, scales, device, view)
        for number, item in enumerate(group):
            own, size = [x[number] for x in logits], item["img_ori"].shape[:2]
            yield label_map_from_logits(own, tuple(size), align_corners=model.align_corners).cpu().numpy()


def view_logits(
    model: Model, item: dict, device: torch.device | str = "cpu", view: InferenceOptions = DEFAULT_INFERENCE
) -> list[Tensor]:
    """Logits (C, h, w) float32 of every view of an item; arguments as of `label_map`."""
    return [at_least_float32(x[0]) for x in _all_logits(model, item["img_data"], device, view)]


@torch.inference_mode()
def _all_logits(
    model: Model, scales: Sequence[Tensor], device: torch.device | str, view: InferenceOptions
) -> list[Tensor]:
    """Logits (N, C, h, w) of every scale, and of its mirrored pictures, mirrored back."""
    logits = []
    with view.arithmetic(device):
        for x in (scale.to(device, non_blocking=True) for scale in scales):
            logits.append(model.logits({"img_data": x}))
            if view.flip:
                logits.append(model.logits({"img_data": x.flip(-1)}).flip(-1))
    return logits


@torch.inference_mode()
def multi_scale_scores(
    model: Model,
    scales: Sequence[Tensor],
    size: tuple[int, int],
    device: torch.device | str = "cpu",
    view: InferenceOptions = DEFAULT_INFERENCE,
) -> Tensor:
    """Class probabilities of a picture, averaged over its scales and what `view` adds.

    Args:
        model, device, view: as of `label_map`.
        scales: normalized pictures (1, 3, h, w), one per scale.
        size: (height, width) of the result, the picture's own.

    Returns:
        (C, height, width) on `device`, summing to 1 over C.
    """
    if view.window is not None:
        return torch.cat(list(score_strips(model, scales, size, device, view)), dim=1)
    total: Tensor | None = None
    for x in scales:
        scores = _scores(model, x.to(device, non_blocking=True), size, view)
        total = scores if total is None else total.add_(scores)
    return total.div_(len(scales)) if len(scales) > 1 else total


def _scores(model: Model, x: Tensor, size: tuple[int, int], view: InferenceOptions) -> Tensor:
    """Probabilities (C, *size) of a picture or region (1, 3, h, w)."""
    with view.arithmetic(x.device):
        scores = model({"img_data": x}, segSize=size)[0]
        if not view.flip:
            return scores
        mirrored = model({"img_data": x.flip(-1)}, segSize=size)[0].flip(-1)
        return scores.add_(mirrored).div_(2)
