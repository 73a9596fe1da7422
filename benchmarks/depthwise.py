"""Compare `layers.dilated_depthwise` with PyTorch's dilated depthwise convolution, in training steps on a CPU.

    python benchmarks/depthwise.py [--repeats N] [--busy CORES] [--json FILE]

Measures forward and backward pass of single convolutions (4 images, channels last), and of whole networks with the
decoder C1 and deep supervision (4 images of 240x320 pixels, 11 classes).
"""

from unittest import mock

import torch
import torch.nn.functional as F
from common import busy, interleaved, parser_of, write

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.models import ModelBuilder, SegmentationModule, layers

CONVOLUTIONS = [  # kernel size, dilation, channels, height, width
    *((3, 2, 384, 30, 40), (3, 4, 960, 30, 40), (5, 2, 672, 30, 40), (5, 4, 1152, 30, 40), (5, 2, 1152, 15, 20)),
]
NETWORKS = [
    ("mobilenetv2dilated", 8),
    ("mobilenetv2dilated", 16),
    ("efficientnet_lite0", 8),
    ("efficientnet_lite0", 16),
]


def pytorch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int) -> torch.Tensor:
    """Convolve with `F.conv2d`; the arguments are those of `layers.dilated_depthwise`."""
    return F.conv2d(x, weight, bias, 1, dilation * (weight.size(2) // 2), dilation, x.size(1))


FUNCTIONS = {"PyTorch": pytorch, "ours": layers.dilated_depthwise}


def convolution(function, kernel_size: int, dilation: int, channels: int, *size: int):
    """Return the function to measure."""
    x = torch.randn(4, channels, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels, 1, kernel_size, kernel_size, requires_grad=True)
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x, weight, None, dilation), (x, weight), gradient)


def network(function, encoder: str, output_stride: int):
    """Return the function to measure."""
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False, output_stride=output_stride)
    dec = ModelBuilder.build_decoder("c1_deepsup", num_class=11, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, MaskedNLLLoss(), 0.4).to(memory_format=torch.channels_last).train()
    x = torch.randn(4, 3, 240, 320).contiguous(memory_format=torch.channels_last)
    feed = {"img_data": x, "seg_label": torch.randint(0, 11, (4, 30, 40))}

    def step():
        with mock.patch.object(layers, "dilated_depthwise", function):
            module.zero_grad(set_to_none=True)
            module(feed)[0].backward()

    return step


def main() -> None:
    parser = parser_of(__doc__, device=False)
    parser.add_argument("--busy", type=int, default=0, metavar="CORES", help="number of cores to keep busy meanwhile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [
        *(
            (f"{k}x{k}, dilation {d}, {c} channels, {h}x{w}", convolution, (k, d, c, h, w))
            for k, d, c, h, w in CONVOLUTIONS
        ),
        *((f"{name}, output stride {stride}", network, (name, stride)) for name, stride in NETWORKS),
    ]
    rows = []
    with busy(args.busy):
        for name, make, arguments in cases:
            steps = {key: make(function, *arguments) for key, function in FUNCTIONS.items()}
            ms = interleaved(steps, torch.device("cpu"), args.repeats)
            times = {f"{key} ms": value for key, value in ms.items()}
            rows.append({"case": name, **times, "times faster": ms["PyTorch"] / ms["ours"]})
    write(args.json, "depthwise", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
