"""Start and stop DataLoader workers, and report their failures."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch.utils.data import DataLoader, Dataset

from ..lib.utils import UserError, available_cores

try:
    import resource
except ImportError:  # not available on Windows
    resource = None

MAX_OPEN_FILES = 65536
LESS_MEMORY = "reduce TRAIN.workers, or increase the shared memory (docker run --shm-size 8g)"


class LoaderError(UserError, RuntimeError):
    """A DataLoader worker was killed or timed out, shared memory is full, or too many files are open."""


def make_loader(dataset: Dataset, *, workers: int, timeout: float = 0, local_size: int = 1, **options) -> DataLoader:
    """Build a DataLoader with at most one worker per CPU core. `local_size` ranks share the cores of the machine.

    Datasets must not use global random state, as workers ignore TRAIN.seed. `timeout` is in seconds; 0 sets no limit.
    """
    workers = min(workers, max(1, available_cores() // local_size))
    if workers and resource:  # every tensor that a worker sends needs a file descriptor
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < min(hard, MAX_OPEN_FILES):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_OPEN_FILES), hard))
    return DataLoader(
        dataset,
        num_workers=workers,
        timeout=timeout if workers else 0,
        generator=torch.Generator(),  # drawing the base seed must not change the global random state
        worker_init_fn=_ignore_interrupts,
        **options,
    )


def _ignore_interrupts(worker_id: int) -> None:
    """Ignore Ctrl+C in a worker, because the main process stops the workers."""
    if hasattr(os, "setpgrp"):  # not available on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def iterate(loader: DataLoader) -> Iterator:
    """Yield all batches, then kill workers. Turn errors about workers, shared memory or open files into LoaderError."""
    workers = set()
    try:
        others = set(multiprocessing.active_children())
        iterator = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        if reason := _resource_failure(error) or _worker_failure(error):
            raise LoaderError(f"loading data: {reason}") from error
        raise
    finally:
        for worker in workers:  # PyTorch sends only SIGTERM, which does not end a suspended process
            with suppress(RuntimeError):  # PyTorch's SIGCHLD handler can raise this error
                if worker.is_alive():
                    worker.kill()
                    worker.join()


@contextmanager
def worker_errors() -> Iterator[None]:
    """Context manager for a loop over `iterate`. Converts errors about failed workers to LoaderError.

    PyTorch's signal handler can raise these errors at any statement in the loop.
    """
    try:
        yield
    except RuntimeError as error:
        if reason := _worker_failure(error):
            raise LoaderError(f"loading data: {reason}") from error
        raise


def _resource_failure(error: Exception) -> str:
    if os.strerror(errno.EMFILE) in str(error):
        return "too many open files; increase the limit (ulimit -n 4096), or reduce TRAIN.workers"
    if "shared memory" in str(error) or os.strerror(errno.ENOSPC) in str(error):
        return f"shared memory (/dev/shm) is full; {LESS_MEMORY}"
    return ""


def _worker_failure(error: Exception) -> str:
    message = str(error) or type(error).__name__
    if "DataLoader timed out" in message and not isinstance(error, LoaderError):
        return f"a worker hangs ({message}); check the disk, or increase RUNTIME.timeout"
    # If a worker is killed while it sends a batch, the connection breaks. Dataset errors start with "Caught".
    lost_connection = isinstance(error, (ConnectionError, EOFError)) and not message.startswith("Caught")
    if lost_connection or message.startswith("DataLoader worker (pid"):
        cause = message.partition(". ")[0].strip()
        return f"a worker was killed ({cause}); it probably ran out of memory or shared memory; {LESS_MEMORY}"
    return ""
