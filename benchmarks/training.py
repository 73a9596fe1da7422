"""Measure time and memory of a training step.

    python benchmarks/training.py [--device cuda] [--json FILE]

The networks have random weights, and a step has two images.

- baseline: float32, channels first, pyramid maps resized and concatenated, log-softmax and NLL loss, and an optimizer
  that updates the parameters one by one.
- float32, bfloat16: our implementation, in float32 or with TRAIN.amp bf16: channels last, `conv_over_pyramid`, cross
  entropy from logits, and a fused optimizer.
- bfloat16, activation checkpointing: like bfloat16, with TRAIN.activation_checkpointing.

Memory is the increase of the peak memory in a new process that builds network and optimizer and runs two steps.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from common import elsewhere, grown, interleaved, parser_of, write
from torch import nn

from mit_semseg.engine import build_loss, build_optimizer
from mit_semseg.lib.nn import enable_activation_checkpointing
from mit_semseg.models import ModelBuilder, SegmentationModule, pyramid

PAIRS = (
    ("mobilenetv2dilated", "c1_deepsup"),
    ("mobilenetv2dilated", "ppm_deepsup"),
    ("resnet50dilated", "ppm_deepsup"),
    ("hrnetv2", "c1"),
)
RATE = 8  # downsampling rate of the label


@dataclass(frozen=True)
class Implementation:
    """Settings of a training step; the defaults are our implementation in float32."""

    ours: bool = True
    amp: bool = False
    checkpointing: bool = False


IMPLEMENTATIONS = {
    "baseline": Implementation(ours=False),
    "float32": Implementation(),
    "bfloat16": Implementation(amp=True),
    "bfloat16, activation checkpointing": Implementation(amp=True, checkpointing=True),
}


class LogSoftmaxLoss(nn.NLLLoss):
    """Loss of the baseline, computed from log-probabilities because `of_logits` is missing."""


class Step:
    """A training step with its network, optimizer and batch; call it to run the step."""

    def __init__(self, encoder: str, decoder: str, how: Implementation, size: tuple[int, int], device: torch.device):
        torch.manual_seed(0)
        enc = ModelBuilder.build_encoder(encoder, pretrained=False)
        dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
        crit = build_loss() if how.ours else LogSoftmaxLoss(ignore_index=-1)
        self.module, self.how, self.device = SegmentationModule(enc, dec, crit, 0.4).to(device).train(), how, device
        height, width = size
        self.feed = {
            "img_data": torch.randn(2, 3, height, width, device=device),
            "seg_label": torch.randint(-1, 150, (2, height // RATE, width // RATE), device=device),
        }
        if how.ours:
            self.module.to(memory_format=torch.channels_last)
            self.feed["img_data"] = self.feed["img_data"].contiguous(memory_format=torch.channels_last)
            self.optimizer = build_optimizer(self.module.encoder, self.module.decoder)
        else:
            self.optimizer = torch.optim.SGD(
                self.module.parameters(), 0.02, momentum=0.9, weight_decay=1e-4, foreach=False
            )
        if how.checkpointing:
            enable_activation_checkpointing(self.module.encoder)

    def __call__(self) -> None:
        baseline = mock.patch.object(pyramid, "conv_over_pyramid", pyramid.conv_over_resized)
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self.how.ours else baseline:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.how.amp):
                loss, _ = self.module(self.feed)
            loss.backward()
        self.optimizer.step()


def memory(*arguments) -> float:
    """Return by how many MiB network, optimizer and two steps increase the peak memory."""

    def train() -> None:
        step = Step(*arguments)
        step()
        step()

    return grown(train, arguments[-1])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(448, 600), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=range(len(PAIRS)), help="indices of `PAIRS` to measure (default: all)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, size, rows = torch.device(args.device), tuple(args.size), []
    for pair in (PAIRS[number] for number in args.pairs):
        steps = {name: Step(*pair, how, size, device) for name, how in IMPLEMENTATIONS.items()}
        ms = interleaved(steps, device, args.repeats)
        del steps
        mib = {name: elsewhere(memory, *pair, how, size, device) for name, how in IMPLEMENTATIONS.items()}
        rows += [
            {
                "network": " + ".join(pair),
                "implementation": name,
                "ms": ms[name],
                "MiB": mib[name],
                "times faster": ms["baseline"] / ms[name],
                "memory ratio": mib[name] / mib["baseline"],
            }
            for name in IMPLEMENTATIONS
        ]
    write(args.json, f"training, 2x3x{size[0]}x{size[1]}", device, rows)


if __name__ == "__main__":
    main()
