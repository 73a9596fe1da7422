"""Reading ahead in worker processes, and what is said when one of them dies."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from ..lib.utils import UserError, available_cores


class LoaderError(UserError, RuntimeError):
    """A loader process that died or hangs; the message says how and what to do."""


def make_loader(dataset: Dataset, *, workers: int, timeout: float = 0, processes: int = 1, **options) -> DataLoader:
    """Loader whose worker processes share this machine's cores with those of other processes.

    Args:
        dataset: whose items are functions of their index alone: the workers need no seeds.
        workers: loader processes; no more are used than there are cores for.
        timeout: seconds to wait for a worker, 0 for ever.
        processes: on this machine that load at the same time.
        options: of `DataLoader`.
    """
    workers = min(workers, max(1, available_cores() // processes))
    # The loader draws a base seed: not from the stream of a training run.
    return DataLoader(
        dataset,
        num_workers=workers,
        timeout=timeout if workers else 0,
        generator=torch.Generator(),
        worker_init_fn=_of_its_own,
        **options,
    )


def _of_its_own(number: int) -> None:
    """Ctrl-C on a terminal, and signals to a group of processes, are for those that end the loader processes."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def items(loader: DataLoader) -> Iterator:
    """Items of a loader.

    Raises:
        LoaderError: what loading needs is used up: shared memory, files that may be open, processes.
    """
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        reason = _used_up(str(error)) or _worker_trouble(str(error))
        if reason is None:
            raise
        raise LoaderError(f"reading data: {reason}") from error


@contextmanager
def explained() -> Iterator[None]:
    """Turn what PyTorch raises about a loader's processes into one sentence. It does so at any moment, in the middle of
    whatever is done with the items, so that this goes around all of it.

    Raises:
        LoaderError: a loader process died or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        reason = None if isinstance(error, LoaderError) else _worker_trouble(str(error))
        if reason is None:
            raise
        raise LoaderError(f"reading data: {reason}") from error


SHARED_MEMORY = (
    "shared memory (/dev/shm) is too small for the loader processes: use a larger one (docker run --shm-size 8g), or "
    "fewer processes (TRAIN.workers, 0 needs none)"
)


def _used_up(text: str) -> str | None:
    if "shared memory" in text or os.strerror(errno.ENOSPC) in text:
        return SHARED_MEMORY
    if os.strerror(errno.EMFILE) in text:
        return "too many open files: raise the limit (ulimit -n 4096), or use fewer loader processes (TRAIN.workers)"
    if os.strerror(errno.ENOMEM) in text or os.strerror(errno.EAGAIN) in text:
        return f"no loader process can be started ({text}): use fewer (TRAIN.workers)"
    return None


def _worker_trouble(text: str) -> str | None:
    if "DataLoader timed out" in text:
        return f"a loader process hangs (a network disk?): {text}"
    if "DataLoader worker" not in text:
        return None
    if signal.strsignal(signal.SIGBUS) in text:
        return SHARED_MEMORY
    return (
        f"a loader process was killed ({text.splitlines()[0]}); out of memory, or of shared memory (docker run "
        f"--shm-size 8g)? Use fewer (TRAIN.workers)"
    )
