"""How much faster are two replicas of one process, and two processes, than one device?

    python benchmarks/data_parallel.py [--json FILE]

The same global batch of four pictures per training step (ResNet-18 dilated with C1): on one device with one thread, on
one device with two threads, on two CPU replicas, and in two processes with one thread each. Efficiency is the speed
against one thread, over the number of cores in use.
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import interleaved, parser_of, write

from mit_semseg.engine import MaskedNLLLoss, Processes, Settings, build_optimizer, train_step
from mit_semseg.engine.distributed import Place, parallel
from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models import ModelBuilder, SegmentationModule

CPU = torch.device("cpu")
BATCH = 4


def step_on(devices: int, processes: Processes, size: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """A training step on this process's share of the global batch, with statistics over a process group."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=150, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss())
    for norm in (part for part in module.modules() if isinstance(part, SynchronizedBatchNorm2d)):
        norm.process_group = group
    optimizer = build_optimizer(encoder, decoder, lr_encoder=0.001, lr_decoder=0.001)
    runner, scaler = parallel(module, [CPU] * devices, processes), torch.amp.GradScaler("cpu", enabled=False)
    count = BATCH // devices // processes.size
    batch = {
        "img_data": torch.randn(count, 3, size, size),
        "seg_label": torch.randint(0, 150, (count, size // 8, size // 8)),
    }
    chunks = [[batch] * devices]
    where = {"devices": [CPU] * devices, "processes": processes, "settings": Settings()}
    return lambda: train_step(runner, chunks, optimizer, scaler, **where)


def with_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """The call with another number of threads, which is restored."""

    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            call()
        finally:
            torch.set_num_threads(before)

    return run


def _partner(rank: int, args: argparse.Namespace) -> None:
    """The second process: takes part in the steps that the first one times."""
    processes, _ = _join(rank + 1, args)
    step = step_on(1, processes, args.size, None)
    for _ in range(args.repeats + 1):
        step()


def _join(rank: int, args: argparse.Namespace) -> tuple[Processes, dist.ProcessGroup]:
    """Both processes, and a group of the first one alone."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    return Processes(Place(rank, 2, rank, 2)), dist.new_group([0])


def main() -> None:
    parser = parser_of(__doc__, repeats=7, device=False, threads=None)
    parser.add_argument("--size", type=int, default=192, help="side of the pictures")
    parser.add_argument("--port", type=int, default=29512)
    args = parser.parse_args()
    partner = mp.spawn(_partner, (args,), nprocs=1, join=False)
    alone = Processes()
    both, first = _join(0, args)
    ways = {
        "one device, 1 thread": with_threads(1, step_on(1, alone, args.size, first)),
        "one device, 2 threads": with_threads(2, step_on(1, alone, args.size, first)),
        "2 replicas, 1 thread each": with_threads(1, step_on(2, alone, args.size, first)),
        "2 processes, 1 thread each": step_on(1, both, args.size, None),
    }
    ms = interleaved(ways, CPU, args.repeats)
    partner.join()
    base = ms["one device, 1 thread"]
    rows = [
        {"what": name, "ms per step": value, "speed": base / value, "efficiency": base / value / (2 if i else 1)}
        for i, (name, value) in enumerate(ms.items())
    ]
    write(args.json, f"data_parallel, global batch {BATCH}x3x{args.size}x{args.size}", CPU, rows)


if __name__ == "__main__":
    main()
