"""Compare training steps on the CPU with one device, two replicas in one process, and two ranks.

    python benchmarks/data_parallel.py [--json FILE]

Every case runs a training step of ResNet-18 dilated with C1 for four images in total. Speed is the speedup over one
device with one thread. Efficiency is the speed divided by the number of cores in use.
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
from mit_semseg.models import ModelBuilder, SegmentationModule

CPU = torch.device("cpu")
BATCH = 4


def make_step(world: World, size: int) -> Callable[[], object]:
    """Return a function that runs a training step on the images of this rank."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=150, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss())
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
    """Return a function that calls `function` with `count` threads."""

    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            function()
        finally:
            torch.set_num_threads(before)

    return run


def run_rank_1(_, args: argparse.Namespace) -> None:
    """Run the steps of rank 1 while rank 0 measures their time."""
    step = make_step(join(1, args), args.size)
    for _ in range(args.repeats + 1):
        step()


def join(rank: int, args: argparse.Namespace) -> World:
    """Initialize the process group with one thread per rank; return the `World` of this rank."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    return World(rank, 2, rank, 2)


def main() -> None:
    parser = parser_of(__doc__, repeats=7, device=False, threads=None)
    parser.add_argument("--size", type=int, default=192, help="image height and width")
    parser.add_argument("--port", type=int, default=29512)
    args = parser.parse_args()
    steps = {
        "one device, 1 thread": with_threads(1, make_step(World(), args.size)),
        "one device, 2 threads": with_threads(2, make_step(World(), args.size)),
        "2 replicas, 1 thread each": with_threads(1, make_step(World(devices=[CPU] * 2), args.size)),
    }
    ms = interleaved(steps, CPU, args.repeats)
    rank_1 = mp.spawn(run_rank_1, (args,), nprocs=1, join=False)  # last, because it makes batch norms synchronize
    ms |= interleaved({"2 ranks, 1 thread each": make_step(join(0, args), args.size)}, CPU, args.repeats)
    rank_1.join()
    baseline = ms["one device, 1 thread"]
    rows = [
        {"case": name, "ms per step": value, "speed": baseline / value, "efficiency": baseline / value / cores}
        for (name, value), cores in zip(ms.items(), (1, 2, 2, 2), strict=True)
    ]
    write(args.json, f"data_parallel, global batch {BATCH}x3x{args.size}x{args.size}", CPU, rows)


if __name__ == "__main__":
    main()
