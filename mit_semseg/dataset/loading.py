"""Reading ahead in worker processes, and what is said when one of them dies."""

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
        **options,
    )


@contextmanager
def explained(loader: DataLoader) -> Iterator[None]:
    """Turn what PyTorch raises about a loader's worker processes, at any moment, into one sentence.

    Raises:
        LoaderError: a worker process died, hangs, or ran out of shared memory.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = _reason(str(error), loader)
        if reason is None:
            raise
        raise LoaderError(f"reading data: {reason}") from error


def _reason(text: str, loader: DataLoader) -> str | None:
    if any(word in text for word in ("shared memory", "No space left on device", signal.strsignal(signal.SIGBUS))):
        return (
            f"shared memory (/dev/shm) is too small for {loader.num_workers} loader processes: use a larger one "
            f"(docker run --shm-size 8g), fewer workers, or TRAIN.workers 0"
        )
    if "Too many open files" in text:
        return "too many open files: raise the limit (ulimit -n 4096), or use fewer workers"
    if "DataLoader timed out" in text:
        return f"no batch came within {loader.timeout:g} s: a loader process hangs (a network disk?)"
    if "DataLoader worker" in text:
        return f"a loader process was killed ({text.splitlines()[0]}); out of memory? Use fewer workers"
    return None
