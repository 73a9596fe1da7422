"""Data loading: start and stop DataLoader workers, report their failures, copy batches to a device."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..lib.nn.scatter import copy_to_device
from ..lib.utils import UserError, available_cores
from .transforms import normalize_batch

try:
    import resource
except ImportError:  # not available on Windows
    resource = None

MAX_OPEN_FILES = 65536
LESS_MEMORY = "use fewer workers (TRAIN.workers) or more shared memory (docker run --shm-size 8g)"


class LoaderError(UserError, RuntimeError):
    """A DataLoader worker was killed or timed out, or shared memory or file descriptors ran out."""


def make_loader(dataset: Dataset, *, workers: int, timeout: float = 0, local_size: int = 1, **options) -> DataLoader:
    """Build a DataLoader with at most one worker per CPU core; the `local_size` ranks of this machine share its cores.

    Workers are not seeded, so the dataset must not use global random numbers. `timeout` is in seconds; 0 waits forever.
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
        generator=torch.Generator(),  # the base seed must not change the global random state
        worker_init_fn=_ignore_interrupts,
        **options,
    )


def _ignore_interrupts(worker_id: int) -> None:
    """Ignore Ctrl+C in a worker; the main process stops its workers."""
    if hasattr(os, "setpgrp"):  # not available on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def iterate(loader: DataLoader) -> Iterator:
    """Yield the batches of a loader; kill its workers at the end. Raise LoaderError if a worker fails."""
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
        for worker in workers:  # PyTorch sends SIGTERM, which does not end a process after SIGSTOP
            with suppress(RuntimeError):  # raised by PyTorch's SIGCHLD handler
                if worker.is_alive():
                    worker.kill()
                    worker.join()


@contextmanager
def worker_errors() -> Iterator[None]:
    """Context for a loop over `iterate` that converts errors about workers to `LoaderError`.

    PyTorch's signal handler can raise these errors anywhere in the loop.
    """
    try:
        yield
    except RuntimeError as error:
        if reason := _worker_failure(error):
            raise LoaderError(f"loading data: {reason}") from error
        raise


def _resource_failure(error: Exception) -> str:
    if os.strerror(errno.EMFILE) in str(error):
        return "too many open files; raise the limit (ulimit -n 4096) or use fewer workers (TRAIN.workers)"
    if "shared memory" in str(error) or os.strerror(errno.ENOSPC) in str(error):
        return f"shared memory (/dev/shm) is full; {LESS_MEMORY}"
    return ""


def _worker_failure(error: Exception) -> str:
    message = str(error) or type(error).__name__
    if "DataLoader timed out" in message and not isinstance(error, LoaderError):
        return f"a worker hangs ({message}); check the disk, or raise RUNTIME.timeout"
    # A worker that is killed while it sends a batch closes the connection. Errors of the dataset start with "Caught".
    lost_connection = isinstance(error, (ConnectionError, EOFError)) and not message.startswith("Caught")
    if lost_connection or message.startswith("DataLoader worker (pid"):
        cause = message.partition(". ")[0].strip()
        return f"a worker was killed ({cause}), probably out of memory or shared memory; {LESS_MEMORY}"
    return ""


def images_to_device(batch: dict, device: torch.device | str) -> Tensor | list[Tensor]:
    """Copy `img_data` to a device: a batch (N, 3, H, W), or a list with one tensor per scale. Normalize uint8 there."""
    images, device = batch["img_data"], torch.device(device)
    if device.type != "cpu":
        images = copy_to_device(images, device)
    normalization = batch.get("normalization")
    if normalization is None:
        return images
    if isinstance(images, list):
        return [normalize_batch(scale, normalization) for scale in images]
    return normalize_batch(images, normalization, batch["sizes"])
