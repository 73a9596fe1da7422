"""Compare synchronized batch norm with batch norm that uses local statistics (baseline).

    python benchmarks/sync_bn.py [--device cuda] [--json FILE]

Two ranks run the forward and backward pass of one layer at several map sizes, and a training step of ResNet-50. They
use gloo on the CPU, or NCCL with one GPU per rank.

- ratio: time of synchronized batch norm, divided by the time of the baseline.
- ratio, collectives only: time of the baseline with added collectives, divided by the time of the baseline. They have
  the number and size of those in synchronized batch norm. This ratio shows the cost of the communication.

Then the training step is measured with two replicas in one process (on the CPU, or on two GPUs).
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


def _make_layer_step(kind: type[nn.Module], shape: tuple[int, ...], device: torch.device):
    norm = kind(shape[1]).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape, device=device)
    return lambda: torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), gradient)


class _UnusedCollectives(torch.autograd.Function):
    """Identity that performs one all-reduce in the forward pass and one in the backward pass."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        dist.all_reduce(x.new_zeros(count))
        ctx.mark_dirty(x)  # avoid a copy
        return x

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient.new_zeros(ctx.count))
        return gradient, None


def _make_network_step(kind: str, size: int, devices: list[torch.device]):
    """Return a function that runs a training step on one device of this rank, or on several devices of one process."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("resnet50dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=150, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss()).to(devices[0])
    module = to_batchnorm(module)
    if kind == "synchronized":
        module = convert_sync_batchnorm(module)
    elif kind == "collectives only":
        for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.register_forward_hook(
                lambda norm, _, output: _UnusedCollectives.apply(output, 2 * norm.num_features + 1)
            )
    model = UserScatteredDataParallel(DistributedDataParallel(module) if len(devices) == 1 else module, devices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    batches = [
        {"img_data": torch.randn(2, 3, size, size), "seg_label": torch.randint(0, 150, (2, size // 8, size // 8))}
        for _ in devices
    ]

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(batches)[0].mean().backward()
        optimizer.step()

    return step


def run_rank(rank: int, count: int, args: argparse.Namespace) -> None:
    """Run the benchmark on one rank; rank 0 prints the results."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count)
    cases = {
        f"one layer, {'x'.join(map(str, shape))}": {
            "baseline": _make_layer_step(nn.BatchNorm2d, shape, device),
            "synchronized": _make_layer_step(SynchronizedBatchNorm2d, shape, device),
        }
        for shape in SHAPES
    }
    kinds = "baseline", "collectives only", "synchronized"
    cases[f"ResNet-50 step, 2x3x{args.size}x{args.size}"] = {
        kind: _make_network_step(kind, args.size, [device]) for kind in kinds
    }
    rows = [_measure(name, steps, device, args.repeats) for name, steps in cases.items()]
    if rank == 0:
        write(args.json, f"sync_bn, {count} ranks", device, rows)
    dist.destroy_process_group()


def _measure(name: str, steps: dict, device: torch.device, repeats: int) -> dict:
    ms = interleaved(steps, device, repeats)
    baseline, synchronized = ms.pop("baseline"), ms.pop("synchronized")
    return {
        "case": name,
        "baseline ms": baseline,
        "synchronized ms": synchronized,
        "ratio": synchronized / baseline,
        "ratio, collectives only": ms["collectives only"] / baseline if ms else "",
    }


def run_replicas(args: argparse.Namespace) -> None:
    """Run the training step on two replicas of this process."""
    torch.set_num_threads(args.threads)
    devices = [torch.device("cuda", i) if args.device == "cuda" else torch.device("cpu") for i in range(2)]
    steps = {kind: _make_network_step(kind, args.size, devices) for kind in ("baseline", "synchronized")}
    row = _measure(f"ResNet-50 step, 2 x 2x3x{args.size}x{args.size}", steps, devices[0], args.repeats)
    del row["ratio, collectives only"]
    path = args.json if args.only else args.json and f"{args.json}.replicas"
    write(path, "sync_bn, 2 replicas of one process", devices[0], [row])


def main() -> None:
    parser = parser_of(__doc__, repeats=7, threads=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="image height and width in the training step")
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--only", choices=("ranks", "replicas"), help="measure only ranks or only replicas")
    args = parser.parse_args()
    if args.only != "replicas":
        mp.spawn(run_rank, (args.ranks, args), nprocs=args.ranks)
    if args.only != "ranks" and (args.device == "cpu" or torch.cuda.device_count() > 1):
        run_replicas(args)


if __name__ == "__main__":
    main()
