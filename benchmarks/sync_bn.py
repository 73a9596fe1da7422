"""What does synchronizing batch norm cost, against plain batch norm on the same shares?

    python benchmarks/sync_bn.py [--device cuda] [--json FILE]

Two processes (gloo on the CPU, NCCL on GPUs; one GPU is used by one process) each work on their half, forward and
backward: one layer at several map sizes, and a whole ResNet-50 training step. Plain batch norm in the same processes
keeps its statistics to itself. The ratio is synchronized over plain. For the step there is a third way: plain norms
beside which the processes meet as often as the synchronized one lets them, with messages of the same size and nothing
done with them. What that costs is the machine's. Then the same step on two replicas of one process (on the CPU, or on
two GPUs).
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import interleaved, parser_of, write
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel, convert_sync_batchnorm, to_batchnorm
from mit_semseg.models import ModelBuilder, SegmentationModule

SHAPES = [(2, 64, 120, 160), (2, 256, 57, 75), (2, 512, 30, 40), (2, 2048, 15, 20), (2, 512, 6, 6), (2, 512, 1, 1)]


def _layer(kind: type[nn.Module], shape: tuple[int, ...], device: torch.device):
    norm = kind(shape[1]).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape, device=device)
    return lambda: torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), gradient)


class _Meet(torch.autograd.Function):
    """Exchanges a message forward and one backward; the values pass unchanged."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        dist.all_reduce(x.new_zeros(count))
        ctx.mark_dirty(x)  # no copy is made for it
        return x

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient.new_zeros(ctx.count))
        return gradient, None


def _network(kind: str, size: int, devices: list[torch.device]):
    """A training step: of this process among others on one device, or of one process on several."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet50dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=150, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss()).to(devices[0])
    module = to_batchnorm(module)
    if kind == "synchronized":
        module = convert_sync_batchnorm(module)
    elif kind == "meeting only":
        for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.register_forward_hook(lambda norm, _, output: _Meet.apply(output, 2 * norm.num_features + 1))
    runner = UserScatteredDataParallel(DistributedDataParallel(module) if len(devices) == 1 else module, devices)
    optimizer = torch.optim.SGD(runner.parameters(), lr=0.001)
    feeds = [
        {"img_data": torch.randn(2, 3, size, size), "seg_label": torch.randint(0, 150, (2, size // 8, size // 8))}
        for _ in devices
    ]

    def step():
        optimizer.zero_grad(set_to_none=True)
        runner(feeds)[0].mean().backward()
        optimizer.step()

    return step


def work(rank: int, count: int, args: argparse.Namespace) -> None:
    """One of the processes; the first one reports."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count)
    ways = [
        (f"layer {'x'.join(map(str, shape))}", {
            "plain": _layer(nn.BatchNorm2d, shape, device),
            "synchronized": _layer(SynchronizedBatchNorm2d, shape, device),
        })
        for shape in SHAPES
    ]  # fmt: skip
    ways.append(
        (f"ResNet-50 step, 2x3x{args.size}x{args.size}", {
            kind: _network(kind, args.size, [device]) for kind in ("plain", "meeting only", "synchronized")
        })
    )  # fmt: skip
    rows = [_row(name, pair, device, args.repeats) for name, pair in ways]
    if rank == 0:
        write(args.json, f"sync_bn, {count} processes", device, rows)
    dist.destroy_process_group()


def _row(name: str, pair: dict, device: torch.device, repeats: int) -> dict:
    ms = interleaved(pair, device, repeats)
    ratio = ms["synchronized"] / ms["plain"]
    return {
        "what": name,
        "plain ms": ms["plain"],
        "synchronized ms": ms["synchronized"],
        "ratio": ratio,
        "meeting only": ms["meeting only"] / ms["plain"] if "meeting only" in ms else "",
    }


def replicas(args: argparse.Namespace) -> None:
    """The training step on two replicas of this process."""
    torch.set_num_threads(args.threads)
    devices = [torch.device("cuda", i) if args.device == "cuda" else torch.device("cpu") for i in range(2)]
    pair = {kind: _network(kind, args.size, devices) for kind in ("plain", "synchronized")}
    row = _row(f"ResNet-50 step, 2 x 2x3x{args.size}x{args.size}", pair, devices[0], args.repeats)
    path = args.json if args.only else args.json and f"{args.json}.replicas"
    write(path, "sync_bn, 2 replicas of one process", devices[0], [row])


def main() -> None:
    parser = parser_of(__doc__, repeats=7, threads=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures of the training step")
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--only", choices=("processes", "replicas"), help="one of the two parts")
    args = parser.parse_args()
    if args.only != "replicas":
        mp.spawn(work, (args.processes, args), nprocs=args.processes)
    if args.only != "processes" and (args.device == "cpu" or torch.cuda.device_count() > 1):
        replicas(args)


if __name__ == "__main__":
    main()
