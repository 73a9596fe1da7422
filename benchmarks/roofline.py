"""Operations per second of networks in inference, as a fraction of a matrix product's.

    python benchmarks/roofline.py [--device cuda] [--json FILE]

Operations (a multiplication and an addition are two) are counted by PyTorch for an image of 512x688. The limit is a
matrix product of 2048x2048 in the same precision, measured in the same run.
"""

import torch
from common import interleaved, network_of, parser_of, write
from torch.utils.flop_counter import FlopCounterMode

from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.evaluation.inference import PRECISIONS
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
    """Return operations, time and fraction of the limit."""
    network = Predictor(module, device, InferenceOptions(precision=precision)).network
    feed = {"img_data": torch.randn(1, 3, *INPUT, device=device)}
    matrix = torch.randn(SIDE, SIDE, device=device).to(PRECISIONS[precision])
    with FlopCounterMode(display=False) as counter:
        network.logits(feed)
    ms = interleaved({"network": lambda: network.logits(feed), "product": lambda: matrix @ matrix}, device, repeats)
    count, limit = counter.get_total_flops(), 2 * SIDE**3
    reached, possible = count / ms["network"] / 1e6, limit / ms["product"] / 1e6
    return {
        "precision": precision,
        "operations, 10^9": count / 1e9,
        "ms": ms["network"],
        "10^9 per second": reached,
        "of matrix products": possible,
        "fraction": reached / possible,
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
