"""Reading of checkpoint files without executing code from them."""

import os
import pickle
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
    """Weights that cannot be downloaded, read or loaded."""


def read_checkpoint(path: str | os.PathLike):
    """Load a file written by `torch.save`, or a `.safetensors` file, to the CPU.

    Raises:
        WeightsError: the file is missing or damaged, or holds more than tensors, plain values and NumPy scalars.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.pth*")) if path.parent.is_dir() else []
        raise WeightsError(f"checkpoint {path} does not exist" + (f"; found {shorten_list(found)}" if found else ""))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # since PyTorch 1.6; `torch.load` does not compare checksums
            with zipfile.ZipFile(path) as archive:
                # PyTorch 2.6 reads files with the directory attribute as uninitialized memory.
                flagged = (x.filename for x in archive.infolist() if x.file_size and x.external_attr & DIRECTORY)
                if damaged := archive.testzip() or next(flagged, None):
                    raise ValueError(f"{damaged} in it is damaged")
        with torch.serialization.safe_globals(_numpy_scalar_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(f"reading {path} requires safetensors: pip install safetensors") from None
    except pickle.UnpicklingError as error:
        lines = str(error).strip().splitlines() or [""]
        detail = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
        raise WeightsError(
            f"cannot load {path}: it is damaged or holds more than tensors and plain values, and code in a checkpoint "
            f"is never executed ({detail.strip()[:200]})"
        ) from None
    except Exception as error:  # damaged files raise exceptions of many types
        raise WeightsError(f"cannot read {path}: it is damaged or not a checkpoint ({str(error)[:200]})") from None


def _numpy_scalar_types() -> list:
    """Return the globals in pickles of NumPy scalars, which histories and checkpoints of other programs hold."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"  # NumPy 2 and 1
    return [*((scalar, name) for name in names), np.dtype, *dtypes]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Load a state dict, unwrapped (see `WRAPPERS`) and without the prefixes of data parallel and compiled modules.

    Raises:
        WeightsError: see `read_checkpoint`; or the file does not hold a state dict.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        content = f"keys {shorten_list(list(map(str, state)))}" if isinstance(state, dict) else type(state)
        raise WeightsError(f"{path} does not hold a state dict (names -> tensors) but {content}")
    plain = OrderedDict((PREFIXES.sub("", key).replace("_orig_mod.", ""), value) for key, value in state.items())
    if len(plain) != len(state):
        raise WeightsError(f"{path} holds entries that differ only in their prefix (module., _orig_mod.)")
    metadata = getattr(state, "_metadata", {})  # versions of the modules, see `has_inplace_norms`
    valid = isinstance(metadata, dict) and all(isinstance(entry, dict) for entry in metadata.values())
    plain._metadata = metadata if valid else {}
    return plain
