"""Small things that every room needs."""

import errno
import io
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# How text is written. The name of a file may hold bytes that are no text; JSON files keep them, as \\udcXX.
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}


class UserError(Exception):
    """A mistake the user can correct: the message says what was given, what is allowed and what to do.

    Scripts print the message alone, without a traceback.
    """


class WriteError(UserError):
    """A file that could not be written; the message names it and says why."""


# The disk is full, a quota is, the file is too large for it, it is read-only, it fails, or the name is too long for it.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)
HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())[:32]
_bars = {"shown": True}
LONGEST_NAME = 200  # bytes, of the 255 that most file systems take


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file so that under its name there is the old content or all of the new.

    Yields:
        A path in the same folder to write to; it takes the final name when the block ends, and is removed if it raises.
        The folder is made if needed.

    Raises:
        WriteError: the disk is full or cannot be written to, or the path is a folder's or too long.
    """
    path = Path(path)
    if not path.name or os.path.isdir(path):
        raise WriteError(f"{path} is a folder: name the file to write")
    partial = path.with_name(f"{_short(path.name)}.{HOST}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except WriteError:  # of another file, inside this block
        raise
    except Exception as error:
        if reason := _disk_trouble(error):
            raise WriteError(f"{path} cannot be written: {reason}; what was there before is as it was") from None
        raise
    finally:
        with suppress(OSError):  # of a disk that has become read-only; what was wrong has been said
            partial.unlink(missing_ok=True)


def is_abandoned(partial: Path) -> bool:
    """Whether a temporary file of `atomic_write` was left by a process that has ended.

    Files of other machines count as abandoned if they were not modified for a day.
    """
    match = re.search(r"\.(\d+)\.partial$", partial.name)
    if not match:
        return False
    if partial.name[: match.start()].endswith(f".{HOST}"):
        return int(match[1]) == os.getpid() or not is_running(int(match[1]))
    try:
        return time.time() - partial.stat().st_mtime > 24 * 60 * 60
    except OSError:  # renamed or removed in the meantime
        return False


def expand_path(text: str) -> str:
    """A path with `~` and environment variables (`$VAR`, `${VAR}`) expanded; a file of the literal name comes first."""
    return text if os.path.exists(text) else os.path.expanduser(os.path.expandvars(text))


def is_running(process: int) -> bool:
    """Whether this machine has a process of that number; taken for granted where asking would end it (Windows)."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def _short(name: str) -> str:
    """A name that has room for an ending: itself, or its beginning and what tells it from others."""
    if len(os.fsencode(name)) < LONGEST_NAME:
        return name
    return f"{name[:40]}.{zlib.crc32(os.fsencode(name)):08x}"


def _disk_trouble(error: BaseException | None) -> str:
    """What the system says of the disk, where that is behind an error: `torch.save` raises others about it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error.strerror
        error = error.__cause__ or error.__context__
    return ""


def mark_volatile(obj):
    """Detach tensors, also inside (nested) dicts, lists and tuples."""
    if isinstance(obj, torch.Tensor):
        return obj.detach()
    if isinstance(obj, Mapping):
        return {key: mark_volatile(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [mark_volatile(value) for value in obj]
    return obj


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_streams() -> None:
    """Escape characters that the encoding of standard output or error lacks; discard output without such a stream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # of services, and of pythonw
            setattr(sys, name, open(os.devnull, "w", **TEXT))  # noqa: SIM115 (for the rest of the program)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_terminal(stream) -> bool:
    """Whether a stream is a terminal; streams that replace the standard ones may lack `isatty`."""
    return bool(getattr(stream, "isatty", bool)())


def progress_bar(iterable: Iterable | None = None, *, shown: bool = True, **options) -> tqdm:
    """A progress bar with rate and remaining time, on terminals only; see `quiet_bars`.

    Args:
        iterable: to go through, see `tqdm`.
        shown: False shows nothing, e.g. in all processes but one.
        options: of `tqdm`.
    """
    return tqdm(iterable, disable=not (shown and _bars["shown"] and is_terminal(sys.stderr)), **options)


def quiet_bars(quiet: bool = True) -> None:
    """Disable progress bars, or enable them again."""
    _bars["shown"] = not quiet


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_sentence(error: BaseException) -> str:
    """What an error says, without the rest of its report."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".")


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
