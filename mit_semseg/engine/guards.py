"""What surrounds the steps of a run: signals that wait for the end of a step, a check for repeatable operations, and
who says where a process hangs."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..lib.utils import UserError
from .distributed import Processes

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What PyTorch says of an operation that cannot be repeated.
REFUSALS = ("does not have a deterministic implementation", "Deterministic behavior was enabled")
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility


class NondeterministicError(UserError, RuntimeError):
    """An operation that has no deterministic form; the message names it."""


class Interruption:
    """Ctrl-C and SIGTERM are kept until what was learnt is saved; the second time they end the run at once.

    Args:
        active: False leaves the signals alone.
    """

    def __init__(self, active: bool = True):
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, object] = {}
        self._asked: int | None = None

    def __enter__(self) -> "Interruption":
        if self._active:
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self._asked is not None:
            self._carry_out(number, frame)
        self._asked = number
        logger.warning("%s: ending after this step; once more ends at once", signal.Signals(number).name)

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._asked is not None

    def carry_out(self, *, anyway: bool = False) -> None:
        """Do what the signal would have done at once: usually raise `KeyboardInterrupt`. Nothing if there was none.

        Args:
            anyway: raise it also where the signal was for another process of the job.
        """
        if self._asked is not None:
            self._carry_out(self._asked, None)
        if anyway:
            raise KeyboardInterrupt

    def _carry_out(self, number: int, frame) -> None:
        handler = self._before[number]
        if handler == signal.SIG_DFL:
            raise KeyboardInterrupt
        handler(number, frame)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """In here operations give the same bits every time on the same hardware, or say that they cannot.

    Raises:
        NondeterministicError: an operation has no deterministic form on its device.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, UserError) or not any(words in str(error) for words in REFUSALS):
            raise
        raise NondeterministicError(
            f"TRAIN.deterministic: {str(error).split(', but you set')[0].splitlines()[0]}; set it to False, or train "
            f"with --gpus cpu"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class Watchdog:
    """Prints where this process is when it has made no progress for a time: the stack of who waits.

    Args:
        processes: of the job; a process on its own is not watched.
    """

    def __init__(self, processes: Processes):
        self.processes, self.doing = processes, ""
        self._beat, self._ended = time.monotonic(), threading.Event()
        self._thread, self._watched = None, threading.get_ident()
        # A little earlier than the exchange gives up, so that the stack comes before the end.
        self._patience = 0.9 * processes.timeout

    def __enter__(self) -> "Watchdog":
        if self.processes.size > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()  # a thread that still runs when Python ends may take the process down

    def progress(self, doing: str) -> None:
        """Something has been done; `doing` comes next."""
        self.doing, self._beat = doing, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(max(0.1, self._beat + self._patience - time.monotonic())):
            if time.monotonic() - self._beat >= self._patience:
                stack = "".join(traceback.format_stack(sys._current_frames()[self._watched]))
                logger.warning(
                    "no progress for %.0f s in %s; this process is at\n%s", self._patience, self.doing, stack
                )
                self._beat = time.monotonic()
