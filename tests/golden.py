"""Deterministic weights and inputs, for which the golden files in tests/data store the outputs."""

import hashlib
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch


@cache
def golden(name: str) -> dict:
    return json.loads((Path(__file__).parent / "data" / f"{name}.json").read_text())


def fill_value(key: str, shape, gain: float) -> np.ndarray:
    """Return the value of a state-dict entry, which is computed only from `key`, `shape` and `gain`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    rng, leaf, shape = np.random.default_rng(seed), key.rsplit(".", 1)[-1], tuple(shape)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf.endswith("running_mean") or leaf == "bias":
        return rng.normal(0, 0.1, shape).astype(np.float32)
    if leaf.endswith("running_var") or len(shape) < 2:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.normal(0, math.sqrt(gain / int(np.prod(shape[1:]))), shape).astype(np.float32)


def empty(build: Callable[..., torch.nn.Module], *args, **options) -> torch.nn.Module:
    """Build a module on the meta device, where the initialization of weights takes no time."""
    with torch.device("meta"):
        return build(*args, **options)


def fill(module: torch.nn.Module, gain: float) -> torch.nn.Module:
    state = {k: torch.from_numpy(np.asarray(fill_value(k, v.shape, gain))) for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


def golden_input(height: int, width: int) -> torch.Tensor:
    """Return the float32 images (2, 3, height, width) for which the golden files store outputs."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32))


def sample(tensor: torch.Tensor, n: int) -> np.ndarray:
    """Return `n` values of a tensor, at the positions whose values the golden files store."""
    index = np.random.default_rng(12345).integers(0, tensor.numel(), n)
    return tensor.detach().reshape(-1).numpy()[index].astype(np.float64)


def assert_golden(tensor: torch.Tensor, gold: dict, relative: float, values: int = 64) -> None:
    """Compare shape and stored values; the tolerance is `relative` times the largest absolute value."""
    assert list(tensor.shape) == gold["shape"]
    np.testing.assert_allclose(sample(tensor, values), gold["values"], rtol=0, atol=relative * gold["absmax"])
