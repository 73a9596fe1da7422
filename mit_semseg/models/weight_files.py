"""Read checkpoint files without executing code stored in them."""

import json
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..lib.utils import UserError, shorten_list

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which other programs store the state dict
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # prefixes of keys in data parallel and compiled modules
DIRECTORY = 0x10  # MS-DOS attribute that marks a directory in a zip file


class WeightsError(UserError, RuntimeError):
    """Weights cannot be downloaded, read or loaded."""


def read_checkpoint(path: str | os.PathLike):
    """Load a file written by `torch.save`, or a safetensors file, to the CPU.

    Raises a WeightsError if the file is missing or damaged, or contains unsupported objects. Only tensors, built-in
    Python types and NumPy scalars are supported.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.pth*")) if path.parent.is_dir() else []
        raise WeightsError(f"checkpoint {path} does not exist" + (f"; found {shorten_list(found)}" if found else ""))
    try:
        if is_safetensors(path):
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            state = OrderedDict(load_file(path))
            state._metadata = json.loads(metadata.get("versions", "{}"))
            return state
        if zipfile.is_zipfile(path):  # the format since PyTorch 1.6; `torch.load` does not verify checksums
            with zipfile.ZipFile(path) as archive:
                # PyTorch 2.6 returns uninitialized memory for zip entries that are marked as directories.
                flagged = (x.filename for x in archive.infolist() if x.file_size and x.external_attr & DIRECTORY)
                if damaged := archive.testzip() or next(flagged, None):
                    raise ValueError(f"zip entry {damaged} is damaged")
        with torch.serialization.safe_globals(_numpy_scalar_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise exceptions of many types
        lines = str(error).strip().splitlines() or [""]
        detail = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0]).strip()
        raise WeightsError(
            f"cannot read {path}: it is damaged, not a checkpoint, or contains unsupported objects ({detail[:200]}). "
            "Supported are tensors, built-in Python types and NumPy scalars; code in a checkpoint is never executed."
        ) from None


def is_safetensors(path: str | os.PathLike) -> bool:
    """Return whether a file has the safetensors format: the length of the header (8 bytes), then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def stored_temperature(path: str | os.PathLike) -> float:
    """Return the temperature in the metadata of a safetensors file; 1 if there is none, and for other files."""
    if not is_safetensors(path):
        return 1.0
    with safe_open(path, "pt") as file:
        return float((file.metadata() or {}).get("temperature", 1.0))


def _numpy_scalar_types() -> list:
    """Return the functions and classes that `torch.load` must allow to unpickle NumPy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"  # names in NumPy 2 and 1
    return [*((scalar, name) for name in names), np.dtype, *dtypes]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Load the state dict in a file, also if stored under a key in `WRAPPERS`, and remove `PREFIXES` from its keys.

    Raises a WeightsError if the file cannot be read or does not contain a state dict.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        content = f"keys {shorten_list(list(map(str, state)))}" if isinstance(state, dict) else type(state).__name__
        raise WeightsError(f"{path} does not contain a state dict (names to tensors); found {content}")
    plain = OrderedDict((PREFIXES.sub("", key).replace("_orig_mod.", ""), value) for key, value in state.items())
    plain._metadata = getattr(state, "_metadata", {})  # module versions, used by `has_inplace_norms`
    return plain
