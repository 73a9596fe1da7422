"""Running a function in several processes that share a process group."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context


def _work(rank: int, count: int, store: str, timeout: float, function: Callable, arguments: tuple, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
    )
    try:
        results.put((rank, function(rank, *arguments), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # a process group that has failed may wait for its peers when it is taken down


def in_processes(count: int, folder, function: Callable, *arguments, timeout: float = 60) -> list:
    """Results of `function(rank, *arguments)` in `count` gloo processes; plain values, the errors as tracebacks."""
    context = get_context("spawn")
    results, store = context.Queue(), folder / f"store-{function.__name__}"
    processes = [
        context.Process(target=_work, args=(rank, count, store, timeout, function, arguments, results), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    collected = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [error or value for _, value, error in collected]
