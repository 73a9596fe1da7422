"""What does a training step cost, in time and memory?

    python benchmarks/training.py [--device cuda] [--json FILE]

Networks of random weights, two pictures per step. Straightforward: float32, channels first, the pyramid resized and
concatenated, log-softmax and NLL loss, the optimizer parameter by parameter. Ours: channels last, the pyramid folded,
cross entropy from the logits, the fused optimizer; in float32 and with bfloat16 (TRAIN.amp); and with the encoder's
blocks under activation checkpointing. The ways take turns; memory is the growth of the largest resident size in a fresh
process (or, on a GPU, the largest allocation) with network, optimizer and two steps.
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
RATE = 8  # of the label


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    ours: bool = True
    amp: bool = False
    recomputed: bool = False


WAYS = {
    "straightforward": Way(ours=False),
    "float32": Way(),
    "bfloat16": Way(amp=True),
    "bfloat16, recomputed": Way(amp=True, recomputed=True),
}


class LogSoftmaxLoss(nn.NLLLoss):
    """The plain loss, over log-probabilities."""


class Step:
    """A network, its optimizer and a batch; a call is a training step."""

    def __init__(self, encoder: str, decoder: str, way: Way, size: tuple[int, int], device: torch.device):
        torch.manual_seed(0)
        enc = ModelBuilder.build_encoder(encoder, pretrained=False)
        dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
        crit = build_loss() if way.ours else LogSoftmaxLoss(ignore_index=-1)
        self.module, self.way, self.device = SegmentationModule(enc, dec, crit, 0.4).to(device).train(), way, device
        height, width = size
        self.feed = {
            "img_data": torch.randn(2, 3, height, width, device=device),
            "seg_label": torch.randint(-1, 150, (2, height // RATE, width // RATE), device=device),
        }
        if way.ours:
            self.module.to(memory_format=torch.channels_last)
            self.feed["img_data"] = self.feed["img_data"].contiguous(memory_format=torch.channels_last)
            self.optimizer = build_optimizer(self.module.encoder, self.module.decoder)
        else:
            self.optimizer = torch.optim.SGD(
                self.module.parameters(), 0.02, momentum=0.9, weight_decay=1e-4, foreach=False
            )
        if way.recomputed:
            enable_activation_checkpointing(self.module.encoder)

    def __call__(self) -> None:
        plain = mock.patch.object(pyramid, "conv_over_pyramid", pyramid.conv_over_resized)
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self.way.ours else plain:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.way.amp):
                loss, _ = self.module(self.feed)
            loss.backward()
        self.optimizer.step()


def memory(*arguments) -> float:
    """MiB that a network, its optimizer and two steps take, in this process."""

    def train() -> None:
        step = Step(*arguments)
        step()
        step()

    return grown(train, arguments[-1])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(448, 600), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--pairs", type=int, nargs="+", default=range(len(PAIRS)), help="which networks, by number")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, size, rows = torch.device(args.device), tuple(args.size), []
    for pair in (PAIRS[number] for number in args.pairs):
        steps = {name: Step(*pair, way, size, device) for name, way in WAYS.items()}
        ms = interleaved(steps, device, args.repeats)
        del steps
        mib = {name: elsewhere(memory, *pair, way, size, device) for name, way in WAYS.items()}
        rows += [
            {
                "network": " + ".join(pair),
                "way": name,
                "ms": ms[name],
                "MiB": mib[name],
                "times faster": ms["straightforward"] / ms[name],
                "memory ratio": mib[name] / mib["straightforward"],
            }
            for name in WAYS
        ]
    write(args.json, f"training, 2x3x{size[0]}x{size[1]}", device, rows)


if __name__ == "__main__":
    main()
