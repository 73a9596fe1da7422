"""How much of what the machine can do does a network in inference reach?

    python benchmarks/roofline.py [--device cuda] [--json FILE]

Operations (a multiplication and an addition are two) are counted by PyTorch, for a picture of 512x688 and the network
as inference runs it. The machine's limit is what its matrix product of 2048x2048 does in the same precision, in the
same run; a network of matrix products alone, with data that is always in the cache, would reach it.
"""

import torch
from common import interleaved, network_of, parser_of, write
from torch.utils.flop_counter import FlopCounterMode

from mit_semseg.evaluation import InferenceOptions
from mit_semseg.evaluation.network import PRECISIONS
from mit_semseg.models import SegmentationModule

PAIRS = (
    ("mobilenetv2dilated", "c1_deepsup"),
    ("resnet18dilated", "ppm_deepsup"),
    ("resnet50dilated", "ppm_deepsup"),
    ("hrnetv2", "c1"),
)
INPUT, SIDE = (512, 688), 2048


@torch.inference_mode()
def row_of(module: SegmentationModule, precision: str, device: torch.device, repeats: int) -> dict:
    """Operations, time and shares of the limit for a network in a precision."""
    network, feed = (
        InferenceOptions(precision=precision).network(module, device),
        {"img_data": torch.randn(1, 3, *INPUT, device=device)},
    )
    matrix = torch.randn(SIDE, SIDE, device=device).to(PRECISIONS[precision])
    with FlopCounterMode(display=False) as counter:
        network.logits(feed)
    ms = interleaved({"network": lambda: network.logits(feed), "product": lambda: matrix @ matrix}, device, repeats)
    work, limit = counter.get_total_flops(), 2 * SIDE**3
    reached, possible = work / ms["network"] / 1e6, limit / ms["product"] / 1e6
    return {
        "precision": precision,
        "operations, 10^9": work / 1e9,
        "ms": ms["network"],
        "10^9 per second": reached,
        "of matrix products": possible,
        "share": reached / possible,
    }


def main() -> None:
    args = parser_of(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for encoder, decoder in PAIRS:
        module = network_of(encoder, decoder).to(device)
        for precision in ("fp32", "bf16"):
            rows.append({"network": f"{encoder} + {decoder}", **row_of(module, precision, device, args.repeats)})
    write(args.json, f"roofline, {INPUT[0]}x{INPUT[1]}", device, rows)


if __name__ == "__main__":
    main()
