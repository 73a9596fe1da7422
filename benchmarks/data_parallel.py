"""How much faster than one device are two replicas of one process, or two ranks?

    python benchmarks/data_parallel.py [--json FILE]

A training step (ResNet-18 dilated with C1) with a global batch of four images: on one device with one thread, on one
device with two threads, on two CPU replicas, and on two ranks with one thread each. Efficiency is the speedup over one
thread, divided by the number of cores in use.
"""

import argparse
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import interleaved, parser_of, write

from mit_semseg.engine import MaskedNLLLoss, RunFolder, Trainer, TrainingOptions, World, build_optimizer
from mit_semseg.engine.distributed import parallelize
from mit_semseg.engine.train_step import LossWeights
from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models import ModelBuilder, SegmentationModule

CPU = torch.device("cpu")
BATCH = 4


def make_step(world: World, size: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """Return a training step on this rank's part of the global batch, with batch statistics over a process group."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=150, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss())
    for norm in module.modules():
        if isinstance(norm, SynchronizedBatchNorm2d):
            norm.process_group = group
    optimizer = build_optimizer(encoder, decoder, rates=(0.001, 0.001))
    trainer = Trainer(module, optimizer, RunFolder(tempfile.gettempdir()), TrainingOptions(), world)
    trainer.model = parallelize(module, world)
    count = BATCH // len(world.devices) // world.size
    batch = {
        "img_data": torch.randn(count, 3, size, size),
        "seg_label": torch.randint(0, 150, (count, size // 8, size // 8)),
    }
    batches = [[batch] * len(world.devices)]
    return lambda: trainer.train_step(batches, LossWeights(batches, module.crit, world, False))


def with_threads(count: int, function: Callable[[], object]) -> Callable[[], object]:
    """Return a function that calls another one with a number of threads."""

    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            function()
        finally:
            torch.set_num_threads(before)

    return run


def run_rank_1(_, args: argparse.Namespace) -> None:
    """Take part in the steps that rank 0 measures."""
    world, _ = join(1, args)
    step = make_step(world, args.size, None)
    for _ in range(args.repeats + 1):
        step()


def join(rank: int, args: argparse.Namespace) -> tuple[World, dist.ProcessGroup]:
    """Initialize the process group; return the two ranks, and a group of rank 0 only."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    return World(rank, 2, rank, 2), dist.new_group([0])


def main() -> None:
    parser = parser_of(__doc__, repeats=7, device=False, threads=None)
    parser.add_argument("--size", type=int, default=192, help="image height and width")
    parser.add_argument("--port", type=int, default=29512)
    args = parser.parse_args()
    rank_1 = mp.spawn(run_rank_1, (args,), nprocs=1, join=False)
    two_ranks, group = join(0, args)
    steps = {
        "one device, 1 thread": with_threads(1, make_step(World(), args.size, group)),
        "one device, 2 threads": with_threads(2, make_step(World(), args.size, group)),
        "2 replicas, 1 thread each": with_threads(1, make_step(World(devices=[CPU] * 2), args.size, group)),
        "2 ranks, 1 thread each": make_step(two_ranks, args.size, None),
    }
    ms = interleaved(steps, CPU, args.repeats)
    rank_1.join()
    baseline = ms["one device, 1 thread"]
    rows = [
        {"what": name, "ms per step": value, "speed": baseline / value, "efficiency": baseline / value / cores}
        for (name, value), cores in zip(ms.items(), (1, 2, 2, 2), strict=True)
    ]
    write(args.json, f"data_parallel, global batch {BATCH}x3x{args.size}x{args.size}", CPU, rows)


if __name__ == "__main__":
    main()
