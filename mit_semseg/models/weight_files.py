"""Reading of checkpoint files, without executing code in them."""

import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..lib.utils import UserError, shorten_list

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which other programs store the state dict
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # added by data parallel and compiled modules
DIRECTORY = 0x10  # MS-DOS attribute in zip files


class WeightsError(UserError, RuntimeError):
    """Weights cannot be downloaded, read or loaded."""


def read_checkpoint(path: str | os.PathLike):
    """Load a file written by `torch.save`, or a `.safetensors` file, to the CPU.

    Raises a WeightsError if the file is missing or damaged, or if it holds unsupported objects: only tensors, plain
    values and NumPy scalars are supported.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.pth*")) if path.parent.is_dir() else []
        raise WeightsError(f"checkpoint {path} does not exist" + (f"; found {shorten_list(found)}" if found else ""))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # format since PyTorch 1.6; `torch.load` does not verify its checksums
            with zipfile.ZipFile(path) as archive:
                # PyTorch 2.6 returns uninitialized memory for entries with the directory attribute.
                flagged = (x.filename for x in archive.infolist() if x.file_size and x.external_attr & DIRECTORY)
                if damaged := archive.testzip() or next(flagged, None):
                    raise ValueError(f"entry {damaged} is damaged")
        with torch.serialization.safe_globals(_numpy_scalar_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(f"reading {path} requires safetensors: pip install safetensors") from None
    except Exception as error:  # damaged files raise exceptions of many types
        lines = str(error).strip().splitlines() or [""]
        detail = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0]).strip()
        raise WeightsError(
            f"cannot read {path}: it is damaged, not a checkpoint, or holds unsupported objects ({detail[:200]}). "
            "Only tensors, plain values and NumPy scalars are supported; code in a checkpoint is never executed."
        ) from None


def _numpy_scalar_types() -> list:
    """Return the functions and classes needed to unpickle NumPy scalars, which occur in checkpoints."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"  # NumPy 2 and 1
    return [*((scalar, name) for name in names), np.dtype, *dtypes]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Load a state dict; remove `WRAPPERS` and the prefixes of data parallel and compiled modules.

    Raises a WeightsError if the file does not hold a state dict or cannot be read.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        content = f"keys {shorten_list(list(map(str, state)))}" if isinstance(state, dict) else type(state).__name__
        raise WeightsError(f"{path} does not hold a state dict (names -> tensors) but {content}")
    plain = OrderedDict((PREFIXES.sub("", key).replace("_orig_mod.", ""), value) for key, value in state.items())
    plain._metadata = getattr(state, "_metadata", {})  # module versions, see `has_inplace_norms`
    return plain
