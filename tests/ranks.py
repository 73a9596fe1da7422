"""Run a function or a script on several ranks."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from runs import ROOT, Job, forked, small
from scenes import write_pairs

# One thread per rank, so that rounding errors do not depend on the scheduling of threads.
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def _work(rank: int, options: dict, function: Callable, arguments: tuple, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(rank=rank, **options)
    try:
        results.put((rank, function(rank, *arguments), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # a normal exit can wait for other ranks if the process group is broken


def on_ranks(count: int, folder, function: Callable, *arguments, timeout: float = 60, backend: str = "gloo") -> list:
    """Run `function(rank, *arguments)` on `count` ranks; return the value or traceback of each rank."""
    results, store = forked.Queue(), folder / f"store-{function.__name__}-{backend}"
    options = {"backend": backend, "init_method": f"file://{store}", "world_size": count}
    options["timeout"] = timedelta(seconds=timeout)
    processes = [
        forked.Process(target=_work, args=(rank, options, function, arguments, results), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    collected = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [error or value for _, value, error in collected]


def write_images(folder):
    """Write a dataset whose training images have one size, so that two batches of two equal a batch of four."""
    write_pairs(folder / "train", [(56, 40)] * 10, seed=1)
    write_pairs(folder / "val", [(50, 40), (40, 56), (44, 44)], seed=3)
    return folder


def changes_for(root, folder, **changes):
    """Return the arguments of a short run on several ranks; see `small` for `changes`."""
    fixed = {
        "DATASET.imgSizes": 40,
        "DATASET.random_flip": False,
        "TRAIN.batch_size_per_gpu": 2,
        "TRAIN.epoch_iters": 8,
        "TRAIN.disp_iter": 1,
        "TRAIN.workers": 1,
        "TRAIN.eval_epoch": 1,
        "RUNTIME.timeout": 60,
    }
    return small(root, folder, **{**fixed, **changes})


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the environment of a rank, with the variables that torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {**ENV, **{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"}


def start_ranks(name: str, *arguments, count: int = 2, own: Sequence[dict] = ({}, {})) -> list[Job]:
    """Start a script on several ranks without torchrun (which is slow); rank r also gets the arguments `own[r]`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Job(name, *arguments, own[rank], env=rank_environment(rank, count, port)) for rank in range(count)]


def children(pid: int) -> list[int]:
    """Return the IDs of the child processes of a process, or an empty list if the process has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
