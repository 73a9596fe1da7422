"""Predict the time of a training step on several GPUs from the operators of the step.

    python benchmarks/scaling.py [--network resnet50dilated ppm_deepsup]

No GPU is needed. A step of the network runs on the meta device, where a dispatch mode adds up its floating point
operations, kernel launches and memory traffic.

- device: operations of convolutions and matrix products / `--tflops`, plus bytes that all other operators read and
  write / `--memory`.
- host: launches * `--launch`, the time that the CPU needs to launch the kernels.
- step: max(device + batch norm, host) + gradients.
- efficiency: step on one GPU / step on several GPUs.

With several GPUs, there are two further times:

- Synchronized batch norm has two collectives per layer. Each takes `--latency` inside a machine, and `--latency` +
  `--hop` between machines. A layer also has 8 more launches than local batch norm.
- The gradients are averaged with ring all-reduce: in a ring of n members, each member sends 2 (n - 1) / n times the
  bytes of the gradients. The times in a machine and between machines are added. The transfer overlaps with the backward
  pass, estimated as 2/3 of the device time; "gradients" is the rest. Collectives of batch norm that wait for a transfer
  of gradients are not included.

The defaults are for H100 GPUs in machines of eight: half the peak rate of bfloat16 products and 85 % of the memory and
NVLink bandwidths in NVIDIA's data sheet. Latencies and launch times are assumptions; they were not measured.
"""

import argparse
from dataclasses import dataclass

import torch
from common import table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mit_semseg.engine import build_loss
from mit_semseg.lib.nn.batchnorm import SynchronizedBatchNorm
from mit_semseg.models import ModelBuilder, SegmentationModule

NETWORKS = (
    ("mobilenetv2dilated", "c1_deepsup"),
    ("resnet50dilated", "ppm_deepsup"),
    ("resnet50", "upernet"),
    ("hrnetv2", "c1"),
)
PRODUCTS = {"convolution", "convolution_backward", "mm", "bmm", "addmm", "baddbmm"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
SYNC_LAUNCHES = 8  # further launches of a synchronized batch norm, forward and backward
STATE_BYTES = 20  # SGD reads weight, gradient and momentum and writes weight and momentum, 4 bytes each
BACKWARD = 2 / 3  # fraction of the device time in which gradients can be sent
GPUS_PER_MACHINE = 8


@dataclass
class Counts:
    """Counts of a training step on one GPU."""

    flops: float = 0
    launches: int = 0
    traffic: float = 0  # bytes
    norms: int = 0
    parameters: int = 0


class _Traffic(TorchDispatchMode):
    """Adds launches and bytes of all operators to `counts`; products count as launches only."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if not function.is_view and name not in ALLOCATIONS:
            self.counts.launches += 1
            if name not in PRODUCTS:
                self.counts.traffic += sum(map(_bytes, (*args, *(kwargs or {}).values(), result)))
        return result


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def count(encoder: str, decoder: str, images: int, size: tuple[int, int]) -> Counts:
    """Count a step in bfloat16 with `images` images per GPU."""
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, build_loss(), 0.4).to("meta")
    counts = Counts(parameters=sum(p.numel() for p in module.parameters()))
    counts.norms = sum(isinstance(part, SynchronizedBatchNorm) for part in module.modules())
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(torch.bfloat16)  # as with autocast; norms accept bfloat16 inputs and float32 parameters
    feed = {
        "img_data": torch.empty(images, 3, *size, device="meta", dtype=torch.bfloat16),
        "seg_label": torch.empty(images, *(side // 8 for side in size), device="meta", dtype=torch.int64),
    }
    with _Traffic(counts):
        with FlopCounterMode(display=False) as flops:
            loss, _ = module(feed)
        loss.backward()
    # The backward pass needs twice the operations. PyTorch counts too many for convolutions with groups.
    counts.flops = 3 * flops.get_total_flops()
    counts.traffic += counts.parameters * (STATE_BYTES + 6)  # the optimizer, and weights cast from float32 to bfloat16
    return counts


def predict(counts: Counts, gpus: int, network: float, args) -> dict[str, float]:
    """Return the times of a step in ms on `gpus` GPUs; `network` is the bandwidth of a machine in Gbit/s."""
    machines = -(-gpus // GPUS_PER_MACHINE)
    device = counts.flops / (args.tflops * 1e9) + counts.traffic / (args.memory * 1e6)
    launches, sync, transfer = counts.launches, 0.0, 0.0
    if gpus > 1:
        launches += SYNC_LAUNCHES * counts.norms
        sync = 2 * counts.norms * (args.latency + (args.hop if machines > 1 else 0)) / 1e3
        ring, own = 4 * counts.parameters, min(gpus, GPUS_PER_MACHINE)  # gradients are float32
        transfer = 2 * (own - 1) / own * ring / (args.nvlink * 1e6)
        if machines > 1:
            transfer += 2 * (machines - 1) / machines * ring / (network / 8 * 1e6)
    host, exposed = launches * args.launch / 1e3, max(0.0, transfer - BACKWARD * device)
    return {
        "device": device,
        "host": host,
        "sync": sync,
        "exposed": exposed,
        "step": max(device + sync, host) + exposed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs=2, metavar=("ENCODER", "DECODER"), help="default: four networks")
    parser.add_argument("--images", type=int, default=2, help="images per GPU (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(448, 600), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tflops", type=float, default=495, help="rate of products, 10^12/s (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=2850, help="memory bandwidth, GB/s (default: %(default)s)")
    parser.add_argument("--launch", type=float, default=6, help="host time per launch, us (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=15, help="collective in a machine, us (default: %(default)s)")
    parser.add_argument("--hop", type=float, default=20, help="added between machines, us (default: %(default)s)")
    parser.add_argument(
        "--nvlink", type=float, default=380, help="bandwidth per direction, GB/s (default: %(default)s)"
    )
    args = parser.parse_args()
    rows = []
    for encoder, decoder in [args.network] if args.network else NETWORKS:
        counts = count(encoder, decoder, args.images, tuple(args.size))
        alone = predict(counts, 1, 0, args)["step"]
        for gpus, network in ((1, 0), (8, 0), (32, 100), (32, 400), (128, 100), (128, 400)):
            times = predict(counts, gpus, network, args)
            rows.append(
                {
                    "network": f"{encoder} + {decoder}",
                    "GPUs": gpus,
                    "between machines": f"{network} Gbit/s" if network else "-",
                    "GFLOP": round(counts.flops / 1e9),
                    "launches": counts.launches + (SYNC_LAUNCHES * counts.norms if gpus > 1 else 0),
                    "GB traffic": counts.traffic / 1e9,
                    "device ms": times["device"],
                    "host ms": times["host"],
                    "batch norm ms": times["sync"],
                    "gradients ms": times["exposed"],
                    "step ms": times["step"],
                    "efficiency": alone / times["step"],
                }
            )
    print(table(f"predicted training steps, {args.images} images of {args.size[0]}x{args.size[1]} per GPU", rows))


if __name__ == "__main__":
    main()
