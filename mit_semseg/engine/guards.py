"""What surrounds the steps of a run: signals that wait for the end of a step, and a check for repeatable operations."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..lib.utils import UserError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What PyTorch says of an operation that cannot be repeated.
REFUSALS = ("does not have a deterministic implementation", "Deterministic behavior was enabled")
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility


class Unrepeatable(UserError, RuntimeError):
    """An operation that has no deterministic form; the message names it."""


class Interruption:
    """Ctrl-C and SIGTERM are kept until what was learnt is saved; the second time they end the run at once.

    Args:
        active: False leaves the signals alone, e.g. in one process of several, which cannot end a step by itself.
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

    def carry_out(self) -> None:
        """Do what the signal would have done at once: usually raise `KeyboardInterrupt`. Nothing if there was none."""
        if self._asked is not None:
            self._carry_out(self._asked, None)

    def _carry_out(self, number: int, frame) -> None:
        handler = self._before[number]
        if handler == signal.SIG_DFL:
            raise KeyboardInterrupt
        handler(number, frame)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """In here operations give the same bits every time on the same hardware, or say that they cannot.

    Raises:
        Unrepeatable: an operation has no deterministic form on its device.
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
        raise Unrepeatable(
            f"TRAIN.deterministic: {str(error).split(', but you set')[0].splitlines()[0]}; set it to False, or train "
            f"with --gpus cpu"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
