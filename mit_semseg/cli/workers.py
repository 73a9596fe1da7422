"""Distribute images over ranks or worker processes, and write files in a background thread."""

import logging
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..dataset.samplers import shards
from ..engine import World
from ..lib.utils import UserError, available_cores
from .logs import setup_logger

logger = logging.getLogger(__name__)

MAX_PENDING_WRITES = 4  # low, because each pending write keeps an image in memory


@dataclass(frozen=True)
class Shard:
    """A shard of a list of images, and the device of the rank or worker process that processes this shard."""

    device: torch.device
    index: int = 0
    count: int = 1  # number of shards
    local_size: int = 1  # number of shards that this machine processes at the same time


class WorkerError(UserError, RuntimeError):
    """A worker process was killed. The message contains the device and the image numbers of this process."""


Work = Callable[..., Any]  # work(shard, report, *arguments) -> result; `work` calls report(text) after every image


def run_sharded(work: Work, world: World, length: int, arguments: Sequence, on_report: Callable[[str], None]) -> list:
    """Run `work` on every shard of a list and return the results in the order of the shards.

    With several ranks, each rank runs `work` on one shard, and gets all results. A single process starts one worker
    process per device, or runs `work` itself if there is one device. If a worker process fails, all are killed.

    Args:
        work: picklable function, which is called as `work(shard, report, *arguments)`.
        world: ranks and devices.
        length: length of the list.
        arguments: further arguments of `work`, all picklable.
        on_report: called in this process with every text that `work` passes to `report`.
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
    """Run `work` in one process per device. Each process sends reports and a result through a separate pipe."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
    count, level = len(devices), logger.getEffectiveLevel()
    threads = max(1, available_cores() // count)
    processes, pipes, results, done = [], {}, [None] * count, [0] * count
    try:
        for index in range(count):
            pipe, worker_pipe = context.Pipe()
            pipes[pipe] = index
            processes.append(context.Process(target=_run_worker, args=(worker_pipe, index, level, threads)))
            processes[-1].start()
            worker_pipe.close()  # otherwise `recv` would not fail after the worker has ended
        for pipe, index in pipes.items():
            with suppress(BrokenPipeError):  # the worker was killed; `recv` below reports this
                pipe.send((work, Shard(devices[index], index, count, count), arguments))
        while pipes:
            for pipe in wait(list(pipes)):
                index = pipes[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError):
                    images = shards(length, count)[index]
                    raise WorkerError(
                        f"the worker process on {devices[index]} for images {images.start + 1} to {images.stop} was "
                        f"killed after {done[index]} images; if this machine was out of memory, use fewer devices"
                    ) from None
                if kind == "report":
                    done[index] += 1
                    on_report(value)
                elif kind == "error":
                    raise value[0] from RuntimeError(f"in a worker process:\n{value[1]}")
                else:
                    results[index] = value
                    del pipes[pipe]
        return results
    finally:
        for process in processes:
            if pipes:  # an error has ended the loop above
                process.kill()
            process.join()


def _run_worker(pipe: Connection, index: int, level: int, threads: int) -> None:
    """Send ("report", text) after every image, and finally ("result", value) or ("error", (exception, traceback))."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    setup_logger(index, None, level)
    torch.set_num_threads(threads)
    work, shard, arguments = pipe.recv()
    try:
        answer = "result", work(shard, lambda text: pipe.send(("report", text)), *arguments)
    except Exception as error:
        answer = "error", (error, traceback.format_exc())
    pipe.send(answer)


@contextmanager
def background_writer() -> Iterator[Callable[..., None]]:
    """Yield `submit(function, *arguments)`, which calls functions in a background thread, in the order of submission.

    `submit` blocks while `MAX_PENDING_WRITES` calls are pending. An exception in the thread is raised again by a later
    `submit`, or at the end of the context.
    """
    pending: deque[Future] = deque()

    def submit(function: Callable[..., object], *arguments) -> None:
        while len(pending) >= MAX_PENDING_WRITES or (pending and pending[0].done()):
            pending.popleft().result()
        pending.append(pool.submit(function, *arguments))

    with ThreadPoolExecutor(1) as pool:
        yield submit
        for future in pending:
            future.result()
