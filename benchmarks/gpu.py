"""Measure training, evaluation and label maps on a GPU, and compare them with the limits of this GPU.

    python benchmarks/gpu.py [SECTION ...] [--json FILE]

The limits are measured first: products of matrices in three precisions, and copies in GPU memory. Sections:

- training: steps of two images of 448x600 pixels. "Step ms" is the time per step, without synchronization between
  steps; "host ms" is the time that the CPU needs to queue a step. "Share" is the rate of floating point operations
  divided by the rate of matrix products. "Estimate ms" is the time of these operations at the rate of matrix products,
  plus the time of the memory traffic of all other operators at the rate of a copy. The traffic is counted without
  fusion, so compiled steps can be faster.
- sync_bn: training steps with batch norm synchronized over eight simulated ranks. Operators in GPU memory replace the
  collectives of batch norm. Gradients are not averaged.
- evaluation: images per second from files to metrics and panels, see `benchmarks/evaluation.py`.
- labels: label maps; "GB/s" is the size of the logits and of the label map, divided by the time.
- loader: training images per second from 1 and from all workers, and images per second that a training step consumes.
- memory: peak allocated and reserved memory in 60 steps with random image sizes.
- peers: steps of segmentation_models.pytorch and torchvision in bfloat16, if installed. The images of 448x608 pixels
  are already on the GPU, and the labels are not downsampled.

`--device cpu --tiny` runs the sections on the CPU with small inputs, to test this script.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import evaluation
import torch
import torch.distributed as dist
from common import hardware, parser_of, table
from label_map import IMPLEMENTATIONS, make_logits
from scaling import count
from torch import nn
from torch.utils.data import DataLoader
from training import RATE

from data import datasets, write_images
from mit_semseg.engine import RunFolder, Trainer, TrainingOptions, World, build_loss, build_optimizer
from mit_semseg.engine.train_step import LossWeights
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, compile_blocks, sync_stats
from mit_semseg.models import ModelBuilder, SegmentationModule

NETWORKS = (
    ("resnet50dilated", "ppm_deepsup"),
    ("mobilenetv2dilated", "c1_deepsup"),
    ("hrnetv2", "c1"),
    ("resnet50", "upernet"),
)
DTYPES = {"fp32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16}
MODES = {"fp32": "fp32", "TF32": "TF32", "bf16": "bf16", "bf16, compiled": "bf16"}  # name -> precision


class Bench:
    """Device, sizes and measured limits of a run.

    Attributes:
        matmul_rates: products of matrices, 10^9 operations/s, by precision.
        copy_bandwidth: memory read and written by a copy, GB/s.
    """

    def __init__(self, args):
        self.device, self.tiny, self.repeats = torch.device(args.device), args.tiny, args.repeats
        self.networks = (("resnet18dilated", "ppm_deepsup"),) if args.tiny else NETWORKS
        self.modes = {"fp32": "fp32", "bf16": "bf16"} if args.tiny else MODES
        self.size = (64, 96) if args.tiny else (448, 600)
        self.matmul_rates, self.copy_bandwidth = {}, 0.0

    def measure_limits(self) -> list[dict]:
        side, elements = (256, 2**20) if self.tiny else (8192, 2**29)
        for name, dtype in DTYPES.items():
            matrix = torch.randn(side, side, device=self.device).to(dtype)
            with tf32(name == "TF32"):
                self.matmul_rates[name] = 2 * side**3 / self.time(lambda matrix=matrix: matrix @ matrix)["step"] / 1e6
        source = torch.randn(elements, device=self.device)
        target = torch.empty_like(source)
        self.copy_bandwidth = 2 * 4 * elements / self.time(lambda: target.copy_(source))["step"] / 1e6
        return [
            {f"{name}, 10^12/s": rate / 1e3 for name, rate in self.matmul_rates.items()}
            | {"copy GB/s": self.copy_bandwidth}
        ]

    def time(self, call: Callable[[], object]) -> dict[str, float]:
        """Return the time per call, and the time to queue a call, in ms."""
        for _ in range(3):
            call()
        self.wait()
        start = time.perf_counter()
        for _ in range(self.repeats):
            call()
        host = time.perf_counter() - start
        self.wait()
        total = time.perf_counter() - start
        return {"step": total / self.repeats * 1e3, "host": host / self.repeats * 1e3}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def batch(self, size: tuple[int, int]) -> dict:
        """Return a batch as a DataLoader returns it: uint8 images and labels in pinned memory."""
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(-1, 150, (2, *(-(-side // RATE) for side in size)))
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        return {"img_data": images, "seg_label": labels, "sizes": [size] * 2, "normalization": "imagenet"}

    def step(self, encoder: str, decoder: str, mode: str) -> Callable[[dict], None]:
        """Return a function that takes a batch and runs a training step, see `Trainer.train_step`."""
        torch.manual_seed(0)
        enc = ModelBuilder.build_encoder(encoder, pretrained=False)
        dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
        module = SegmentationModule(enc, dec, build_loss(), 0.4).train()
        module.to(self.device, memory_format=torch.channels_last)
        if "compiled" in mode:
            compile_blocks(module.encoder)
        options = TrainingOptions(amp="bf16" if "bf16" in mode else "off", channels_last=True)
        optimizer = build_optimizer(module.encoder, module.decoder)
        trainer = Trainer(module, optimizer, RunFolder("."), options, World(devices=[self.device]))

        def run(batch: dict) -> None:
            weights = LossWeights([[batch]], module.crit, trainer.world, False)
            trainer.train_step([trainer.to_devices([batch])], weights)

        return run


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Context that enables or disables TF32 in matrix products and convolutions."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = enabled
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def simulated_ranks() -> Iterator[None]:
    """Context in which norms are synchronized over eight simulated ranks."""
    with (
        mock.patch.object(SynchronizedBatchNorm2d, "_syncs_ranks", lambda self: self.training),
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_world_size", return_value=8),
        mock.patch.object(dist, "all_reduce", lambda x: x.mul_(1)),
        mock.patch.object(sync_stats, "all_gather", lambda out, x: out.copy_(x.expand_as(out))),
    ):
        yield


def training(bench: Bench, synchronized: bool = False) -> list[dict]:
    rows, batch = [], bench.batch(bench.size)
    for pair in bench.networks:
        counts = count(*pair, 2, bench.size)
        for mode, precision in bench.modes.items():
            if synchronized and "compiled" in mode:  # the compiler does not support simulated ranks
                continue
            step = bench.step(*pair, mode)
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with tf32(precision != "fp32"), simulated_ranks() if synchronized else nullcontext():
                start = time.perf_counter()
                step(batch)
                bench.wait()
                first = time.perf_counter() - start
                times = bench.time(lambda step=step: step(batch))
            rate = counts.flops / times["step"] / 1e6
            traffic = counts.traffic * (1 if precision == "bf16" else 2)  # counted in bfloat16
            estimate = counts.flops / bench.matmul_rates[precision] / 1e6 + traffic / bench.copy_bandwidth / 1e6
            row = {"network": " + ".join(pair), "precision": mode, "step ms": times["step"]}
            row |= {"host ms": times["host"], "first step s": first, "10^12/s": rate / 1e3}
            row |= {
                "share": rate / bench.matmul_rates[precision],
                "estimate ms": estimate,
                "ratio to estimate": times["step"] / estimate,
            }
            if bench.device.type == "cuda":
                row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            rows.append(row)
    return rows


def sync_bn(bench: Bench) -> list[dict]:
    return training(bench, synchronized=True)


def evaluation_section(bench: Bench) -> list[dict]:
    images, workers = (4, 0) if bench.tiny else (64, os.cpu_count() or 1)
    cases = evaluation.CASES[:1] if bench.tiny else evaluation.CASES
    rows = [row for case in cases for row in evaluation.measure(*case, bench.device, images, workers, 1)]
    return [row | {"images/s": 1e3 / row["ms per image"]} for row in rows]


def labels(bench: Bench) -> list[dict]:
    rows, size = [], (64, 96) if bench.tiny else (512, 683)
    for scales in (1, 5):
        logits = make_logits("smooth", 150, size, scales, bench.device)
        with torch.inference_mode():
            ms = {name: bench.time(partial(call, logits, size))["step"] for name, call in IMPLEMENTATIONS.items()}
        rate = (sum(x.numel() * 4 for x in logits) + size[0] * size[1]) / ms["ours"] / 1e6
        row = {"scales": scales, "baseline ms": ms["baseline"], "ours ms": ms["ours"]}
        rows.append(
            row
            | {"times faster": ms["baseline"] / ms["ours"], "GB/s": rate, "share of copy": rate / bench.copy_bandwidth}
        )
    return rows


def loader(bench: Bench) -> list[dict]:
    rows, batches = [], 4 if bench.tiny else 200
    with TemporaryDirectory() as folder:
        write_images(Path(folder))
        dataset = datasets(Path(folder))["fast"]
        for workers in sorted({1, os.cpu_count() or 1}):
            start = time.perf_counter()
            for _ in DataLoader(dataset, batch_size=None, sampler=range(batches), num_workers=workers):
                pass
            rows.append({"workers": workers, "images/s": 2 * batches / (time.perf_counter() - start)})
    step, batch = bench.step(*bench.networks[0], "bf16"), bench.batch(bench.size)
    needed = 2e3 / bench.time(lambda: step(batch))["step"]
    return [row | {f"images/s of a {bench.networks[0][0]} step": needed} for row in rows]


def memory(bench: Bench) -> list[dict]:
    if bench.device.type != "cuda":
        return []
    rows = []
    for pair in bench.networks:
        step = bench.step(*pair, "bf16")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            step(bench.batch(tuple(8 * int(n) for n in torch.randint(38, 110, (2,), generator=generator))))
        allocated, reserved = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
        row = {"network": " + ".join(pair), "allocated MiB": allocated, "reserved MiB": reserved}
        rows.append(row | {"reserved / allocated": reserved / allocated})
    return rows


def peers(bench: Bench) -> list[dict]:
    networks = {}
    if find_spec("segmentation_models_pytorch"):
        import segmentation_models_pytorch as smp

        for name in ("DeepLabV3Plus", "UPerNet"):
            networks[f"smp {name}, resnet50"] = lambda name=name: getattr(smp, name)(
                "resnet50", encoder_weights=None, classes=150
            )
    if find_spec("torchvision"):
        from torchvision.models.segmentation import deeplabv3_resnet50

        networks["torchvision deeplabv3_resnet50"] = lambda: deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=150
        )
    rows, (height, width) = [], (64, 96) if bench.tiny else (448, 608)
    images = torch.randn(2, 3, height, width, device=bench.device).contiguous(memory_format=torch.channels_last)
    label = torch.randint(0, 150, (2, height, width), device=bench.device)
    for name, build in networks.items():
        module = build().to(bench.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9, fused=True)

        def step(module=module, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, torch.bfloat16):
                output = module(images)
            logits = (output["out"] if isinstance(output, dict) else output).float()
            nn.functional.cross_entropy(logits, label).backward()
            optimizer.step()

        rows.append({"network": name, **{f"{key} ms": value for key, value in bench.time(step).items()}})
    return rows


SECTIONS = {
    "training": training,
    "sync_bn": sync_bn,
    "evaluation": evaluation_section,
    "labels": labels,
    "loader": loader,
    "memory": memory,
    "peers": peers,
}


def main() -> None:
    parser = parser_of(__doc__, repeats=20, threads=None, device=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small inputs, to test this script")
    args = parser.parse_args()
    if unknown := sorted(set(args.sections) - set(SECTIONS)):
        parser.error(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU was found")
    bench, results = Bench(args), {}
    print(f"{hardware(bench.device)}, PyTorch {torch.__version__}\n")
    results["limits"] = bench.measure_limits()
    print(table("limits", results["limits"]), flush=True)
    for name in args.sections or SECTIONS:
        results[name] = SECTIONS[name](bench)
        if results[name]:
            print(f"\n{table(name, results[name])}", flush=True)
    if args.json:
        content = {"hardware": hardware(bench.device), "torch": torch.__version__, **results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
