"""Compare the operations per second of networks in inference with those of a matrix product.

    python benchmarks/roofline.py [--device cuda] [--json FILE]

PyTorch counts the operations for an image of 512x688; a multiplication and an addition are two operations. The
reference is the product of two 2048x2048 matrices in the same precision, measured in the same run.
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
    """Measure one network; return a row of the table."""
    network = Predictor(module, device, InferenceOptions(precision=precision)).network
    feed = {"img_data": torch.randn(1, 3, *INPUT, device=device)}
    matrix = torch.randn(SIDE, SIDE, device=device).to(PRECISIONS[precision])
    with FlopCounterMode(display=False) as counter:
        network.logits(feed)
    ms = interleaved({"network": lambda: network.logits(feed), "product": lambda: matrix @ matrix}, device, repeats)
    count = counter.get_total_flops()
    speed, reference = count / ms["network"] / 1e6, 2 * SIDE**3 / ms["product"] / 1e6
    return {
        "precision": precision,
        "10^9 operations": count / 1e9,
        "ms": ms["network"],
        "10^9 operations/s": speed,
        "matrix product, 10^9 operations/s": reference,
        "fraction": speed / reference,
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
