"""Errors, atomic file writing, progress bars and conversions used by all packages."""

import difflib
import errno
import io
import os
import re
import socket
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# Options of `open` for text files. File names in the text may have undecodable bytes; these are written as \\udcXX.
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}
HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())[:32]
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # mean of R, G and B, for pixel values in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ENAMETOOLONG)
_progress_bars = {"enabled": True}


class UserError(Exception):
    """An error that the user can correct. Scripts print its message without a traceback."""


class WriteError(UserError):
    """A file cannot be written."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file atomically: an error or a crash leaves the previous file unchanged.

    Yields a temporary path in the same folder; a file written there is renamed to `path` at the end. Missing folders
    are created. Raises WriteError if the disk is full, read-only or damaged, or if `path` is a folder or too long.
    """
    path = Path(path)
    if not path.name or os.path.isdir(path):
        raise WriteError(f"{path} is a folder; give the name of a file")
    short_name = f"{path.name[:40]}.{zlib.crc32(os.fsencode(path.name)):08x}"  # file systems limit the length of names
    partial = path.with_name(f"{short_name}.{HOST}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except Exception as error:
        reason = _disk_error_message(error)
        if not reason or isinstance(error, WriteError):  # reported by a nested call
            raise
        raise WriteError(f"{path} cannot be written: {reason}; the previous file is unchanged") from None
    finally:
        with suppress(OSError):  # the disk may have become read-only
            partial.unlink(missing_ok=True)


def _disk_error_message(error: BaseException | None) -> str:
    """Return the message of the first disk error among `error` and its causes, or an empty string if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error.strerror
        error = error.__cause__ or error.__context__
    return ""


def expand_path(text: str) -> str:
    """Expand `~` and environment variables in a path, unless a file with the literal name exists."""
    return text if os.path.exists(text) else os.path.expanduser(os.path.expandvars(text))


def cache_dir() -> Path:
    """Return the folder for downloaded weights and counted pixels.

    This is `$MIT_SEMSEG_HOME`, by default `mit_semseg` in the user's cache.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("MIT_SEMSEG_HOME") or f"{user_cache}/mit_semseg"))


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_streams() -> None:
    """Make stdout and stderr escape characters that they cannot encode; replace missing streams by `os.devnull`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # on Windows, in a service or under pythonw
            setattr(sys, name, open(os.devnull, "w", **UTF8))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream) -> bool:
    """Return whether a stream is a terminal; False for objects without `isatty`."""
    return bool(getattr(stream, "isatty", bool)())


def progress_bar(iterable: Iterable | None = None, *, shown: bool = True, **options) -> tqdm:
    """Return a `tqdm` progress bar, hidden if standard error is not a terminal or `shown` is False."""
    return tqdm(iterable, disable=not (shown and _progress_bars["enabled"] and is_terminal(sys.stderr)), **options)


def disable_progress_bars(disabled: bool = True) -> None:
    """Disable all progress bars, or enable them again with `disabled=False`."""
    _progress_bars["enabled"] = not disabled


def shorten_list(names: Sequence[str], limit: int = 5) -> str:
    """Join at most `limit` names with commas and add the number of omitted names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?" for the most similar known name, ignoring case, or "" if none is similar."""
    spellings = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=cutoff)
    return f"; did you mean {spellings[near[0]]}?" if near else ""


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error message, without its period."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".")


def as_numpy(obj):
    """Convert tensors and scalars in nested mappings and sequences to NumPy arrays in nested dicts and lists."""
    if isinstance(obj, Mapping):
        return {key: as_numpy(value) for key, value in obj.items()}
    if isinstance(obj, Sequence) and not isinstance(obj, str):
        return [as_numpy(value) for value in obj]
    if isinstance(obj, torch.Tensor):
        return obj.detach().cpu().numpy()
    return np.array(obj)


def map_tensors(function: Callable, obj):
    """Return nested dicts, lists and tuples with `function` applied to all tensors; other values are kept."""
    if isinstance(obj, torch.Tensor):
        return function(obj)
    if isinstance(obj, Mapping):
        return {key: map_tensors(function, value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        values = [map_tensors(function, value) for value in obj]
        return type(obj)(*values) if hasattr(obj, "_fields") else type(obj)(values)
    return obj


def cache_tensors(build: Callable) -> Callable:
    """Decorate a function that builds small constant tensors: cache up to 1,024 results.

    Arguments must be hashable, and the last one is the device. Tensors are created on this device, because a copy from
    CPU memory synchronizes. For MPS, which does not support float64, they are created on the CPU. Do not modify the
    results. They can be used in training even if they were created in inference mode.
    """

    def build_on_device(*args):
        *others, device = args
        with torch.inference_mode(False), torch.no_grad():
            built = build(*others, torch.device("cpu") if device.type == "mps" else device)
            return map_tensors(lambda tensor: tensor.to(device), built)

    stored = lru_cache(maxsize=1024)(build_on_device)

    @wraps(build)
    def cached(*args):
        # `torch.export` creates fake tensors without data, which must not be cached.
        is_real = type(torch.empty(0, device="cpu")) is torch.Tensor
        return (stored if is_real else build_on_device)(*args)

    return cached


def mark_volatile(obj):
    """Return nested dicts, lists and tuples with all tensors detached."""
    return map_tensors(torch.Tensor.detach, obj)
