"""From a network and a picture to a label map."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Model = Callable[..., Tensor]  # module({"img_data": (1, 3, h, w)}, segSize=(H, W)) -> probabilities (1, C, H, W)


@torch.inference_mode()
def multi_scale_scores(
    model: Model, scales: Sequence[Tensor], size: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Class probabilities of a picture, averaged over its scales.

    Args:
        model: a `SegmentationModule` in eval mode, or any callable of the same form.
        scales: normalized pictures (1, 3, h, w), one per scale.
        size: (height, width) of the result, the picture's own.
        device: where the model is.

    Returns:
        (C, height, width) on `device`, summing to 1 over C.
    """
    total: Tensor | None = None
    for x in scales:
        scores = model({"img_data": x.to(device, non_blocking=True)}, segSize=size)[0]
        total = scores if total is None else total.add_(scores)
    return total.div_(len(scales)) if len(scales) > 1 else total


def label_map(model: Model, item: dict, device: torch.device | str = "cpu") -> np.ndarray:
    """The most probable class of every pixel.

    Args:
        model: see `multi_scale_scores`.
        item: of a `ValDataset` or `TestDataset`: `img_ori` (H, W, 3) and `img_data`, one tensor per scale.
        device: where the model is.

    Returns:
        (H, W) int64 class indices.
    """
    size = tuple(item["img_ori"].shape[:2])
    return multi_scale_scores(model, item["img_data"], size, device).argmax(dim=0).cpu().numpy()
