"""Reading ahead in worker processes, and what is said when one of them dies."""

import errno
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset

from ..lib.utils import UserError, available_cores

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None

OPEN_FILES = 65536  # that this process may have, if its system allows
_END = object()


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
    if workers and resource:  # every tensor on its way is an open file
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < min(hard, OPEN_FILES):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))
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
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def items(loader: DataLoader) -> Iterator:
    """Items of a loader, whose processes end with it, whatever state they are in.

    Raises:
        LoaderError: what loading needs is used up: shared memory, files that may be open, processes.
    """
    patience = _Patience(loader.timeout)
    try:
        before = active_children()
        iterator = iter(loader)
        with patience.with_processes([process for process in active_children() if process not in before]):
            while True:
                with patience.waiting():
                    item = next(iterator, _END)
                if item is _END:
                    return
                yield item
    except Exception as error:
        reason = f"a loader process hangs, for {loader.timeout:g} s" if patience.lost else None
        if isinstance(error, (RuntimeError, OSError)):
            reason = reason or _used_up(str(error)) or _worker_trouble(str(error))
        if reason is None:
            raise
        raise LoaderError(f"reading data: {reason}") from error


class _Patience:
    """Ends loader processes with which something is wrong.

    PyTorch waits for an item with a time-out, but without one for what is in it, which a process hands over; and when
    it is done it waits for its processes to hear SIGTERM, which those that are stopped do not.

    Args:
        seconds: to wait for an item, 0 for ever.

    Attributes:
        lost: they were ended for that.
    """

    def __init__(self, seconds: float):
        self._seconds, self._since, self.lost = 1.25 * seconds, math.inf, False
        self._processes: Sequence[BaseProcess] = ()
        self._ended = threading.Event()

    @contextmanager
    def with_processes(self, processes: Sequence[BaseProcess]) -> Iterator[None]:
        """In here the processes are watched; afterwards there are none."""
        self._processes = processes
        thread = threading.Thread(target=self._watch, name="loader patience", daemon=True)
        if processes and self._seconds:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            if thread.ident:
                thread.join()
            for process in processes:
                with suppress(RuntimeError):  # PyTorch hears of their end, and says that they were killed
                    if process.is_alive():
                        process.kill()
                        process.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In here an item is waited for."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = math.inf

    def _watch(self) -> None:
        while not self._ended.wait(min(1, self._seconds / 4)):
            if time.monotonic() - self._since > self._seconds:
                self.lost = True
                for process in self._processes:
                    process.kill()
                return


@contextmanager
def worker_errors() -> Iterator[None]:
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
