"""Work on a list shared out over devices: in this process, in worker processes, or over the processes of a job."""

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..dataset.samplers import shards
from ..engine import Processes
from ..lib.utils import UserError, available_cores
from .logs import setup_logger

logger = logging.getLogger(__name__)

LAST_WORDS = 10.0  # seconds for a worker to end by itself


@dataclass(frozen=True)
class Share:
    """One part of a list that is processed in parallel.

    Attributes:
        device: that processes the part.
        number, parts: the part is number `number` of `parts`.
        local: parts processed on this machine at the same time.
    """

    device: torch.device
    number: int
    parts: int
    local: int


Work = Callable[..., Any]  # work(share, send, *arguments): processes a share; `send` passes messages to the parent


class WorkerFailed(UserError, RuntimeError):
    """A worker process that failed or was killed; names its share of the list."""


def share_out(
    work: Work,
    devices: Sequence[torch.device],
    processes: Processes,
    count: int,
    arguments: Sequence = (),
    on_message: Callable[[Any], None] = lambda message: None,
) -> list:
    """Do a piece of work in shares, one per device.

    In a job of several processes each does one share. Otherwise there is one worker process per device, or none for a
    single device.

    Args:
        work: a function of a module; called as `work(share, send, *arguments)`.
        devices: of this process; the CPU may come more than once.
        processes: of the job.
        count: length of the list that is shared out, see `shards`.
        arguments: of the work, plain values.
        on_message: called here with everything the work sends; in a job, with what this process sends.

    Returns:
        What the work returned for every share, in order.

    Raises:
        WorkerFailed: a worker process failed or was killed. The others are stopped.
    """
    if processes.size > 1:
        share = Share(devices[0], processes.rank, processes.size, processes.place.local_size)
        own = work(share, on_message, *arguments)
        return processes.collect(own, "waiting for the shares of the others", patient=True)
    devices = devices[: max(count, 1)]
    if len(devices) == 1:
        return [work(Share(devices[0], 0, 1, 1), on_message, *arguments)]
    return _Workers(work, devices, count, arguments).results(on_message)


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C from their first moment on: it is for the parent, which ends them."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(
    connection: Connection,
    start_method: str,
    level: int,
    work: Work,
    share: Share,
    arguments: Sequence,
) -> None:
    """Main function of a worker process."""
    set_start_method(start_method, force=True)  # its loader processes start as those of a process on its own do
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends its loader processes, too
    try:
        setup_logger(share.number, None, level)
        torch.set_num_threads(max(1, available_cores() // share.local))
        result = work(share, lambda m: connection.send(("message", m)), *arguments)
        connection.send(("result", result))
    except UserError as error:
        connection.send(("mistake", str(error)))
    except Exception:  # travels to the parent, which raises it with this worker's share
        connection.send(("failed", traceback.format_exc()))


class _Workers:
    """One process per device, and a connection to each; a connection that ends early means that its process died."""

    def __init__(self, work: Work, devices: Sequence[torch.device], count: int, arguments: Sequence):
        context = get_context("spawn")  # a fork cannot use CUDA
        self.devices, self.count, self.parts = devices, count, shards(count, len(devices))
        self.done = [0] * len(devices)
        self.unfinished: dict[Connection, int] = {}
        self.processes = []
        for number, device in enumerate(devices):
            receiver, sender = context.Pipe(duplex=False)
            share = Share(device, number, len(devices), len(devices))
            process = context.Process(
                target=_worker,
                args=(sender, get_start_method(), logger.getEffectiveLevel(), work, share, arguments),
                name=f"worker {number}",
            )
            self.unfinished[receiver] = number
            try:
                with _without_interrupt():
                    process.start()
                self.processes.append(process)
            except BaseException:
                self._stop()
                raise
            sender.close()  # so that the worker holds the only end: it closes when the worker dies

    def results(self, on_message: Callable[[Any], None]) -> list:
        """Pass messages on until all results are there."""
        results: list = [None] * len(self.devices)
        try:
            while self.unfinished:
                for connection in wait(list(self.unfinished)):
                    number = self.unfinished[connection]
                    kind, value = self._receive(connection, number)
                    if kind == "message":
                        self.done[number] += 1
                        on_message(value)
                    else:
                        results[number] = value
                        del self.unfinished[connection]
        finally:
            self._stop()
        return results

    def _stop(self) -> None:
        """End the workers that are still at it, kindly at first."""
        for process in self.processes:
            if process.is_alive() and self.unfinished:
                process.terminate()
        for process in self.processes:
            process.join(LAST_WORDS)
            process.kill()
            process.join()

    def _receive(self, connection: Connection, number: int) -> tuple[str, Any]:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):  # the worker died, perhaps in the middle of a message
            self.processes[number].join()
            raise WorkerFailed(f"{self._whose(number)} {_how(self.processes[number].exitcode)}") from None
        if kind == "mistake":
            raise WorkerFailed(value)
        if kind == "failed":
            raise WorkerFailed(f"{self._whose(number)} failed:\n{value}")
        return kind, value

    def _whose(self, number: int) -> str:
        part = self.parts[number]
        return (
            f"worker process {number} on {self.devices[number]}, which had images {part.start + 1} to {part.stop} of "
            f"{self.count} and had done {self.done[number]} of them,"
        )


def _how(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}" + (" (out of memory?)" if exitcode == -9 else "")
    return f"ended with exit code {exitcode}"
