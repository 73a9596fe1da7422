"""DataLoader workers: start and stop them, report their failures, move batches to a device."""

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
SHARED_MEMORY_FULL = (
    "shared memory (/dev/shm) is too small for the workers; enlarge it (docker run --shm-size 8g) or use fewer workers "
    "(TRAIN.workers; 0 loads in the main process)"
)


class LoaderError(UserError, RuntimeError):
    """A DataLoader worker was killed or timed out, or shared memory or open files ran out."""


def make_loader(dataset: Dataset, *, workers: int, timeout: float = 0, local_size: int = 1, **options) -> DataLoader:
    """Build a DataLoader with at most one worker per CPU core of this machine, which has `local_size` ranks.

    Items must depend on their index alone, because workers are not seeded. `timeout` is in seconds; 0 waits forever.
    """
    workers = min(workers, max(1, available_cores() // local_size))
    if workers and resource:  # every tensor that a worker sends is an open file
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
    """Leave signals to the main process, which stops its workers."""
    if hasattr(os, "setpgrp"):  # not available on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def iterate(loader: DataLoader) -> Iterator:
    """Yield the batches of a loader; kill its workers at the end. Raise LoaderError if workers or resources fail."""
    workers = set()
    try:
        others = set(multiprocessing.active_children())
        iterator = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        reason = _worker_failure(error)
        if "shared memory" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            reason = SHARED_MEMORY_FULL
        if os.strerror(errno.EMFILE) in str(error):
            reason = "too many open files; raise the limit (ulimit -n 4096) or use fewer workers (TRAIN.workers)"
        if not reason:
            raise
        raise LoaderError(f"loading data: {reason}") from error
    finally:
        for worker in workers:  # SIGTERM, which PyTorch sends, does not end a stopped process
            with suppress(RuntimeError):  # raised by PyTorch's SIGCHLD handler
                if worker.is_alive():
                    worker.kill()
                    worker.join()


@contextmanager
def worker_errors() -> Iterator[None]:
    """Convert PyTorch's errors about workers, which a signal handler raises at any time, to `LoaderError`."""
    try:
        yield
    except RuntimeError as error:
        reason = "" if isinstance(error, LoaderError) else _worker_failure(error)
        if not reason:
            raise
        raise LoaderError(f"loading data: {reason}") from error


def _worker_failure(error: Exception) -> str:
    message = str(error) or type(error).__name__
    if "DataLoader timed out" in message:
        return f"a worker hangs ({message}); check the disk, or raise RUNTIME.timeout"
    # A worker that dies while it sends a batch closes the connection. Errors of the dataset start with "Caught".
    lost_connection = isinstance(error, (ConnectionError, EOFError)) and not message.startswith("Caught")
    if not lost_connection and not message.startswith("DataLoader worker (pid"):
        return ""
    if signal.strsignal(signal.SIGBUS) in message:
        return SHARED_MEMORY_FULL
    return (
        f"a worker was killed ({message.partition('. ')[0].strip()}), probably out of memory or shared memory; use "
        f"fewer workers (TRAIN.workers) or more shared memory (docker run --shm-size 8g)"
    )


def images_to_device(batch: dict, device: torch.device | str) -> Tensor | list[Tensor]:
    """Copy `img_data` of a batch (N, 3, H, W) or an item (one tensor per scale) to a device; normalize uint8 there."""
    images, device = batch["img_data"], torch.device(device)
    if device.type != "cpu":
        images = copy_to_device(images, device)
    normalization = batch.get("normalization")
    if normalization is None:
        return images
    if isinstance(images, list):
        return [normalize_batch(scale, normalization) for scale in images]
    return normalize_batch(images, normalization, batch["sizes"])
