"""How any file of weights is read, without running code from it."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..lib.utils import UserError, shorten

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which programs keep the state dict
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
FOLDER = 0x10  # attribute of a zip file's member


class WeightsError(UserError, RuntimeError):
    """Weights that cannot be had, read or loaded; the message says what to do."""


def read_checkpoint(path: str | os.PathLike):
    """Read a file written by `torch.save`, or a state dict in a `.safetensors` file, on the CPU, without running code
    from it.

    Args:
        path: a checkpoint, saved on any device.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds more than tensors, plain values and numbers of
            NumPy; or the library that reads `.safetensors` files is not installed.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.pth*")) if path.parent.is_dir() else []
        there = f"; there is {shorten(near)}" if near else ""
        raise WeightsError(f"no checkpoint {path}{there}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(_numbers_of_numpy()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0] if reason else ""
        )
        raise WeightsError(
            f"{path} was refused: it is damaged or holds more than tensors and plain values, and code from a "
            f"checkpoint is never run ({detail.strip()[:200]})"
        ) from None
    except Exception as error:  # the reader meets damaged bytes with any exception there is
        raise WeightsError(f"{path} cannot be read, it is damaged or no checkpoint: {str(error)[:200]}") from None


def _numbers_of_numpy() -> list:
    """What a pickle of NumPy's numbers names: histories and checkpoints of many programs have them."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"  # of NumPy 2 and 1
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise WeightsError(f"{path}: .safetensors files are read by a library: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be read, it is damaged: {str(error)[:200]}") from None


def _check_sums(path: Path) -> None:
    """Compare a file with the checksums in it, which `torch.save` writes and `torch.load` does not look at.

    Files in the form of before PyTorch 1.6, as the published ones are, have none.
    """
    try:
        if not zipfile.is_zipfile(path):  # raises, too, at some damage
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            # What is marked as a folder, PyTorch 2.6 does not read, and takes what happens to be in memory for it.
            folders = [member.filename for member in members if member.external_attr & FOLDER]
            damaged = None if packed else next(iter(folders), None) or archive.testzip()
    except Exception as error:  # the reader meets damaged bytes with any exception there is
        raise WeightsError(f"{path} cannot be read, it is damaged: {str(error)[:200]}") from None
    if packed:
        raise WeightsError(f"{path} was refused: it is compressed, as no checkpoint is, and may unpack to any size")
    if damaged:
        raise WeightsError(f"{path} is damaged: {damaged} in it is not what was saved")


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, without what programs put around it (see `WRAPPERS`), and without the prefixes of data
    parallel and compiled models.

    Raises:
        WeightsError: see `read_checkpoint`; or the file holds no state dict.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not state or not all(map(_is_entry, state.items())):
        kind = f"keys {shorten([str(k) for k in state])}" if isinstance(state, dict) else type(state).__name__
        raise WeightsError(f"{path} holds no state dict (names -> tensors) but {kind}")
    plain = OrderedDict((PREFIXES.sub("", key).replace("_orig_mod.", ""), value) for key, value in state.items())
    if len(plain) != len(state):
        raise WeightsError(f"{path} holds entries that differ in prefixes (module., _orig_mod.) alone")
    about = getattr(state, "_metadata", {})  # tells in-place norms
    sound = isinstance(about, dict) and all(isinstance(entry, dict) for entry in about.values())
    plain._metadata = about if sound else {}
    return plain


def _is_entry(entry: tuple) -> bool:
    key, value = entry
    return isinstance(key, str) and isinstance(value, Tensor)
