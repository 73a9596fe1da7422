"""DataLoader workers: start and stop them, report their failures, move batches to a device."""

import errno
import os
import re
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
    """Build a DataLoader. Its workers share the CPU cores with the other ranks of this machine.

    Args:
        dataset: its items must depend on the index alone, because workers are not seeded.
        workers: number of workers; at most the number of cores per rank are started.
        timeout: seconds to wait for a batch; 0 waits forever.
        local_size: number of ranks on this machine.
        options: further arguments of `DataLoader`.
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
    """Leave Ctrl-C and signals to the process group to the main process, which stops its workers."""
    if hasattr(os, "setpgrp"):  # not available on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def iterate(loader: DataLoader) -> Iterator:
    """Yield the batches of a loader. Kill its workers when the iterator ends or is closed.

    Raises:
        LoaderError: a worker was killed or timed out, or shared memory or open files ran out.
    """
    workers = ()
    try:
        iterator = iter(loader)
        workers = getattr(iterator, "_workers", ())
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        reason = _missing_resource(str(error)) or _worker_failure(error)
        if reason is None:
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
    """Convert PyTorch's errors about workers to `LoaderError`.

    PyTorch raises them in a signal handler, so they can surface in any code that runs while a loader is open.
    """
    try:
        yield
    except RuntimeError as error:
        reason = None if isinstance(error, LoaderError) else _worker_failure(error)
        if reason is None:
            raise
        raise LoaderError(f"loading data: {reason}") from error


def _missing_resource(message: str) -> str | None:
    if "shared memory" in message or os.strerror(errno.ENOSPC) in message:
        return SHARED_MEMORY_FULL
    if os.strerror(errno.EMFILE) in message:
        return "too many open files; raise the limit (ulimit -n 4096) or use fewer workers (TRAIN.workers)"
    return None


def _worker_failure(error: Exception) -> str | None:
    message = str(error) or type(error).__name__
    if "DataLoader timed out" in message:
        return f"a worker hangs ({message}); check the disk, or raise RUNTIME.timeout"
    # A worker that dies while it sends a batch closes the connection. Errors of the dataset start with "Caught".
    lost_connection = isinstance(error, (ConnectionError, EOFError)) and not message.startswith("Caught")
    if not lost_connection and not re.match(r"DataLoader worker \(pid", message):
        return None
    if signal.strsignal(signal.SIGBUS) in message:
        return SHARED_MEMORY_FULL
    return (
        f"a worker was killed ({message.partition('. ')[0].strip()}), probably out of memory or shared memory; use "
        f"fewer workers (TRAIN.workers) or more shared memory (docker run --shm-size 8g)"
    )


def images_to_device(batch: dict, device: torch.device | str) -> Tensor | list[Tensor]:
    """Copy `img_data` of a batch (N, 3, H, W) or of an item (one tensor per scale) to a device.

    uint8 images (see `ImageListDataset.as_uint8`) are normalized there.
    """
    images, device = batch["img_data"], torch.device(device)
    if device.type != "cpu":
        images = copy_to_device(images, device)
    normalization = batch.get("normalization")
    if normalization is None:
        return images
    if isinstance(images, list):
        return [normalize_batch(scale, normalization) for scale in images]
    return normalize_batch(images, normalization, batch["sizes"])
