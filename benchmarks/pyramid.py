"""What does folding the pooled maps of a pyramid into the convolution over them save?

    python benchmarks/pyramid.py [--device cuda] [--json FILE]

The convolution of PPM over a feature map and its pooled maps, and whole networks with it, forward alone (inference) and
forward and backward (training). Plain resizes the pooled maps, concatenates and convolves. Both ways take turns. The
small maps show where folding stops to pay.
"""

import argparse
from unittest import mock

import torch
from common import interleaved, write
from torch import nn

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.models import ModelBuilder, SegmentationModule, pyramid
from mit_semseg.models.layers import POOL_SCALES

WIDTH = 512
WAYS = {"plain": pyramid.conv_over_resized, "folded": pyramid.conv_over_pyramid}


def convolution(way: str, channels: int, size: tuple[int, int], training: bool, device: torch.device):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels + len(POOL_SCALES) * WIDTH, WIDTH, 3, padding=1, bias=False).to(device)
    x = torch.randn(1, channels, *size, device=device, requires_grad=training)
    pooled = [torch.randn(1, WIDTH, bins, bins, device=device, requires_grad=training) for bins in POOL_SCALES]

    def step():
        with mock.patch.object(pyramid, "FEWEST_PIXELS", 0), torch.set_grad_enabled(training):
            y = WAYS[way](conv, x, pooled)
            if training:
                torch.autograd.grad(y.sum(), [x, *pooled, conv.weight])

    return step


def network(way: str, encoder: str, size: tuple[int, int], training: bool, device: torch.device):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder("ppm_deepsup", num_class=150, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, MaskedNLLLoss(), 0.4).to(device).train(training)
    feed = {
        "img_data": torch.randn(1 + training, 3, *size, device=device),
        "seg_label": torch.randint(0, 150, (1 + training, size[0] // 8, size[1] // 8), device=device),
    }

    def step():
        with mock.patch.object(pyramid, "conv_over_pyramid", WAYS[way]), torch.set_grad_enabled(training):
            if not training:
                module.logits(feed)
                return
            module.zero_grad(set_to_none=True)
            module(feed)[0].backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows, cases = torch.device(args.device), [], []
    for channels, size in ((2048, (64, 86)), (320, (64, 86)), (320, (16, 16)), (320, (8, 8)), (320, (4, 4))):
        cases.append((f"convolution, {channels} channels, {size[0]}x{size[1]}", convolution, channels, size))
    for encoder in ("mobilenetv2dilated", "resnet18dilated", "resnet50dilated"):
        cases.append((f"{encoder} + ppm_deepsup", network, encoder, (384, 512)))
    for name, make, *arguments in cases:
        for training in (False, True):
            ways = {way: make(way, *arguments, training, device) for way in WAYS}
            ms = interleaved(ways, device, args.repeats)
            what = f"{name}, {'training' if training else 'inference'}"
            times = {f"{way} ms": value for way, value in ms.items()}
            rows.append({"what": what, **times, "times faster": ms["plain"] / ms["folded"]})
    write(args.json, "pyramid", device, rows)


if __name__ == "__main__":
    main()
