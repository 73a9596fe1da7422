"""What does it save not to resize the smaller maps of a pyramid for the convolution over them?

    python benchmarks/pyramid.py [--device cuda] [--contiguous] [--busy CORES] [--json FILE]

The convolutions of PPM (over a feature map and its pooled maps) and of UPerNet (over the maps of a feature pyramid),
and whole networks with them, forward alone (inference) and forward and backward (training). Plain resizes the smaller
maps, concatenates and convolves. Both ways take turns. The first rows also say how many times fewer multiplications
there are for the largest of the smaller maps: where that is less than `pyramid.GAIN`, networks resize it.
"""

from unittest import mock

import torch
from common import busy, interleaved, parser_of, write
from torch import nn

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.models import ModelBuilder, SegmentationModule, pyramid
from mit_semseg.models.layers import POOL_SCALES

WIDTH = 512
WAYS = {"plain": pyramid.conv_over_resized, "ours": pyramid.conv_over_pyramid}
# What, channels of the largest map, its size, sizes of the smaller ones.
POOLED = [(bins, bins) for bins in POOL_SCALES]
CONVOLUTIONS = [
    *((f"PPM, {c} channels", c, size, POOLED) for c, size in ((2048, (64, 86)), (320, (64, 86)), (320, (12, 12)))),
    ("PPM, 320 channels", 320, (6, 6), POOLED),
    ("UPerNet", WIDTH, (96, 128), [(48, 64), (24, 32), (12, 16)]),
    ("UPerNet, next map alone", WIDTH, (96, 128), [(48, 64)]),
    ("a third of the side", WIDTH, (96, 128), [(32, 43)]),
    ("two thirds of the side", WIDTH, (96, 128), [(64, 86)]),
]
NETWORKS = (
    ("mobilenetv2dilated", "ppm_deepsup"),
    ("resnet50dilated", "ppm_deepsup"),
    ("resnet50", "upernet"),
    ("resnet50dilated", "aspp_deepsup"),
)


def convolution(way: str, channels: int, size: tuple, smaller: list, training: bool, device: torch.device, order):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels + len(smaller) * WIDTH, WIDTH, 3, padding=1, bias=False)
    conv = conv.to(device, memory_format=order)
    x = torch.randn(1, channels, *size, device=device).contiguous(memory_format=order)
    maps = [x.requires_grad_(training)]
    maps += [torch.randn(1, WIDTH, *own, device=device, requires_grad=training) for own in smaller]

    def step():
        with mock.patch.object(pyramid, "GAIN", 0), torch.set_grad_enabled(training):
            y = WAYS[way](conv, maps[0], maps[1:])
            if training:
                torch.autograd.grad(y.sum(), [*maps, conv.weight])

    gains = [pyramid._gain(t, size, (3, 3)) for t in maps[1:]]
    return step, min(gains)


def network(way: str, encoder: str, decoder: str, size: tuple[int, int], training: bool, device: torch.device, order):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, MaskedNLLLoss(), 0.4).to(device, memory_format=order)
    module.train(training)
    x = torch.randn(1 + training, 3, *size, device=device).contiguous(memory_format=order)
    feed = {
        "img_data": x,
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
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 352), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--inference", action="store_true", help="leave training out")
    parser.add_argument("--contiguous", action="store_true", help="memory format (default: channels last)")
    parser.add_argument("--busy", type=int, default=0, metavar="CORES", help="that other processes keep busy")
    args = parser.parse_args()
    order = torch.contiguous_format if args.contiguous else torch.channels_last
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []

    def compare(what: str, training: bool, ways: dict, fewer: float | str) -> None:
        ms = interleaved(ways, device, args.repeats)
        times = {f"{way} ms": value for way, value in ms.items()}
        what = f"{what}, {'training' if training else 'inference'}"
        rows.append({"what": what, "fewer products": fewer, **times, "times faster": ms["plain"] / ms["ours"]})

    with busy(args.busy):
        for training in (False,) if args.inference else (False, True):
            for what, channels, size, smaller in CONVOLUTIONS:
                ways = {way: convolution(way, channels, size, smaller, training, device, order) for way in WAYS}
                what = f"{what}, {size[0]}x{size[1]}"
                compare(what, training, {way: step for way, (step, _) in ways.items()}, ways["ours"][1])
            for encoder, decoder in NETWORKS:
                ways = {way: network(way, encoder, decoder, tuple(args.size), training, device, order) for way in WAYS}
                compare(f"{encoder} + {decoder}", training, ways, "")
    write(args.json, "pyramid", device, rows)


if __name__ == "__main__":
    main()
