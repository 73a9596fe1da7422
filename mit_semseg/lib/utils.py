"""Small conversions."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch


def as_numpy(obj):
    """Convert tensors to numpy arrays, also inside (nested) dicts, lists and tuples.

    Args:
        obj: a tensor (any device, with or without gradient), a mapping, a sequence, or anything `numpy.array` takes.

    Returns:
        A numpy array for a tensor or a scalar; a dict or list of the same structure for a container.
    """
    if isinstance(obj, Mapping):
        return {key: as_numpy(value) for key, value in obj.items()}
    if isinstance(obj, Sequence) and not isinstance(obj, str):
        return [as_numpy(value) for value in obj]
    if isinstance(obj, torch.Tensor):
        return obj.detach().cpu().numpy()
    return np.array(obj)
