"""Distribute work on a list of images: over the ranks of a job, or over one worker process per device."""

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..dataset.samplers import shards
from ..engine import World
from ..lib.utils import UserError, available_cores
from .logs import setup_logger

logger = logging.getLogger(__name__)

MAX_PENDING_WRITES = 4  # each holds an image in memory


@dataclass(frozen=True)
class Shard:
    """One part of a list that is processed in parallel.

    Attributes:
        device: that processes the shard.
        index, count: of this shard and of all.
        local_size: number of shards processed on this machine at the same time.
    """

    device: torch.device
    index: int = 0
    count: int = 1
    local_size: int = 1


class WorkerError(UserError, RuntimeError):
    """A worker process that ended unexpectedly; names its device and images."""


Work = Callable[..., Any]  # work(shard, report, *arguments) -> result; report(text) is called after every image


def run_sharded(work: Work, world: World, length: int, arguments: Sequence, on_report: Callable[[str], None]) -> list:
    """Run a function on every shard of a list and return the results in order.

    A job of several ranks has one shard per rank; otherwise there is one worker process per device, or none for a
    single device.

    Args:
        work: a function of a module; called as `work(shard, report, *arguments)`.
        world: ranks and devices.
        length: of the list.
        arguments: of the function; can be pickled.
        on_report: called in this process with every text that its workers report.

    Raises:
        WorkerError: a worker process was killed. The others are stopped.
    """
    if world.size > 1:
        shard = Shard(world.devices[0], world.rank, world.size, world.local_size)
        return world.gather(work(shard, on_report, *arguments), "waiting for the other shards")
    devices = world.devices[: max(length, 1)]
    if len(devices) == 1:
        return [work(Shard(devices[0]), on_report, *arguments)]
    return _run_in_workers(work, devices, length, arguments, on_report)


def _run_in_workers(
    work: Work, devices: Sequence[torch.device], length: int, arguments: Sequence, on_report: Callable[[str], None]
) -> list:
    """One process per device, so that a broken pool names the device; each reports through its own pipe."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    before, level = multiprocessing.active_children(), logger.getEffectiveLevel()
    threads = max(1, available_cores() // len(devices))
    pools, futures, pipes = [], [], {}
    try:
        for index, device in enumerate(devices):
            receiver, sender = context.Pipe(duplex=False)
            pool = ProcessPoolExecutor(
                1, context, initializer=_initialize_worker, initargs=(sender, index, level, threads)
            )
            pools.append(pool)
            shard = Shard(device, index, len(devices), len(devices))
            futures.append(pool.submit(_work_in_worker, work, shard, arguments))
            sender.close()  # the pipe ends with the worker
            pipes[receiver] = index
        done = [0] * len(devices)
        while pipes:
            for receiver in wait(list(pipes)):
                try:
                    text = receiver.recv()
                except EOFError:
                    index = pipes.pop(receiver)
                    _check(futures[index], shards(length, len(devices))[index], devices[index], done[index])
                    continue
                if text is None:  # the worker has finished its shard
                    del pipes[receiver]
                    continue
                done[pipes[receiver]] += 1
                on_report(text)
        return [future.result() for future in futures]
    finally:
        for process in multiprocessing.active_children():
            if process not in before and not all(future.done() for future in futures):
                process.kill()
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _check(future: Future, images: range, device: torch.device, done: int) -> None:
    """Raise what a worker has raised."""
    try:
        future.result()
    except BrokenProcessPool:
        raise WorkerError(
            f"the worker process on {device} for images {images.start + 1} to {images.stop} was killed after {done} "
            f"images (out of memory?)"
        ) from None


_pipe: Connection | None = None  # of a worker process


def _initialize_worker(pipe: Connection, index: int, level: int, threads: int) -> None:
    global _pipe
    _pipe = pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
    setup_logger(index, None, level)
    torch.set_num_threads(threads)


def _work_in_worker(work: Work, shard: Shard, arguments: Sequence):
    try:
        return work(shard, _pipe.send, *arguments)
    finally:
        _pipe.send(None)


class BackgroundWriter:
    """Context that runs functions one after another in a thread, to write results while the network works.

    An exception of a function is raised by the next call or at the end.
    """

    def __init__(self):
        self._pool, self._pending = ThreadPoolExecutor(1), deque()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def submit(self, function: Callable[..., object], *arguments) -> None:
        """Schedule a function; blocks while too many are pending."""
        while len(self._pending) >= MAX_PENDING_WRITES or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(function, *arguments))

    def __exit__(self, kind, *_) -> None:
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
