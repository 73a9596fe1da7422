"""Compare `pyramid.conv_over_pyramid` with resizing, concatenating and convolving (baseline).

    python benchmarks/pyramid.py [--device cuda] [--contiguous] [--busy CORES] [--json FILE]

Measures single convolutions, as in PPM and UPerNet, and whole networks, in inference and in training. For convolutions,
the second column is a ratio: multiplications of the baseline, divided by those of `conv_over_pyramid`. It refers to the
largest of the smaller maps. In networks, a map is resized if its ratio is below `pyramid.MIN_SAVING`.
"""

from unittest import mock

import torch
from common import busy, interleaved, parser_of, write
from torch import nn

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.models import ModelBuilder, SegmentationModule, pyramid
from mit_semseg.models.layers import POOL_SCALES

WIDTH = 512  # channels of the smaller maps and of the output
FUNCTIONS = {"baseline": pyramid.conv_over_resized, "ours": pyramid.conv_over_pyramid}
POOLED = [(bins, bins) for bins in POOL_SCALES]
CONVOLUTIONS = [  # name, channels and size of the largest map, sizes of the smaller maps
    *((f"PPM, {c} channels", c, size, POOLED) for c, size in ((2048, (64, 86)), (320, (64, 86)), (320, (12, 12)))),
    ("PPM, 320 channels", 320, (6, 6), POOLED),
    ("UPerNet", WIDTH, (96, 128), [(48, 64), (24, 32), (12, 16)]),
    ("one smaller map (1/2)", WIDTH, (96, 128), [(48, 64)]),
    ("one smaller map (1/3)", WIDTH, (96, 128), [(32, 43)]),
    ("one smaller map (2/3)", WIDTH, (96, 128), [(64, 86)]),
]
NETWORKS = (
    ("mobilenetv2dilated", "ppm_deepsup"),
    ("resnet50dilated", "ppm_deepsup"),
    ("resnet50", "upernet"),
    ("resnet50dilated", "aspp_deepsup"),
)


def convolution(function, channels: int, size: tuple, smaller: list, training: bool, device: torch.device, layout):
    """Return the function to measure, and the ratio of multiplications (see the module docstring)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels + len(smaller) * WIDTH, WIDTH, 3, padding=1, bias=False)
    conv = conv.to(device, memory_format=layout)
    x = torch.randn(1, channels, *size, device=device).contiguous(memory_format=layout)
    maps = [x.requires_grad_(training)]
    maps += [torch.randn(1, WIDTH, *map_size, device=device, requires_grad=training) for map_size in smaller]

    def step():
        with mock.patch.object(pyramid, "MIN_SAVING", 0), torch.set_grad_enabled(training):
            y = function(conv, maps[0], maps[1:])
            if training:
                torch.autograd.grad(y.sum(), [*maps, conv.weight])

    return step, min(pyramid._saving(t, size, (3, 3)) for t in maps[1:])


def network(function, encoder: str, decoder: str, size: tuple[int, int], training: bool, device: torch.device, layout):
    """Return the function to measure."""
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, MaskedNLLLoss(), 0.4).to(device, memory_format=layout)
    module.train(training)
    x = torch.randn(1 + training, 3, *size, device=device).contiguous(memory_format=layout)
    label = torch.randint(0, 150, (1 + training, size[0] // 8, size[1] // 8), device=device)

    def step():
        with mock.patch.object(pyramid, "conv_over_pyramid", function), torch.set_grad_enabled(training):
            if not training:
                module.logits({"img_data": x})
                return
            module.zero_grad(set_to_none=True)
            module({"img_data": x, "seg_label": label})[0].backward()

    return step


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 352), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--inference", action="store_true", help="do not measure training")
    parser.add_argument("--contiguous", action="store_true", help="use contiguous tensors (default: channels last)")
    parser.add_argument("--busy", type=int, default=0, metavar="CORES", help="number of cores to keep busy meanwhile")
    args = parser.parse_args()
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []

    def compare(name: str, training: bool, steps: dict, saving: float | str) -> None:
        ms = interleaved(steps, device, args.repeats)
        times = {f"{key} ms": value for key, value in ms.items()}
        name = f"{name}, {'training' if training else 'inference'}"
        row = {"case": name, "multiplications, baseline / ours": saving, **times}
        rows.append({**row, "times faster": ms["baseline"] / ms["ours"]})

    with busy(args.busy):
        for training in (False,) if args.inference else (False, True):
            for name, *shapes in CONVOLUTIONS:
                measured = {k: convolution(f, *shapes, training, device, layout) for k, f in FUNCTIONS.items()}
                height, width = shapes[1]
                steps = {key: step for key, (step, _) in measured.items()}
                compare(f"{name}, {height}x{width}", training, steps, measured["ours"][1])
            for names in NETWORKS:
                steps = {
                    k: network(f, *names, tuple(args.size), training, device, layout) for k, f in FUNCTIONS.items()
                }
                compare(" + ".join(names), training, steps, "")
    write(args.json, "pyramid", device, rows)


if __name__ == "__main__":
    main()
