"""Measure inference for one image, from the input of the network to the label map.

    python benchmarks/inference.py [--device cuda] [--json FILE]

The networks have random weights and run in float32. The image has 512x683 pixels and one scale.

- baseline: the network as it was built (channels first). The maps of a pyramid are resized and concatenated. The
  logits of all classes are resized to the image size; softmax and argmax follow.
- ours: fused batch norms, channels last, `conv_over_pyramid`, and `label_map_from_logits`.

"network" is the time of the network only; "end to end" includes the computation of the label map.
"""

from unittest import mock

import torch
import torch.nn.functional as F
from common import interleaved, network_of, parser_of, write

from mit_semseg.evaluation.label_map import label_map_from_logits
from mit_semseg.models import pyramid
from mit_semseg.models.fuse_bn import fuse_batchnorm

PAIRS = (
    ("mobilenetv2dilated", "c1_deepsup"),
    ("mobilenetv2dilated", "ppm_deepsup"),
    ("resnet18dilated", "ppm_deepsup"),
    ("resnet50dilated", "ppm_deepsup"),
    ("hrnetv2", "c1"),
)
SIZE, INPUT = (512, 683), (512, 688)


def implementations_of(encoder: str, decoder: str, device: torch.device) -> dict:
    """Return the functions to measure, by name."""
    baseline = network_of(encoder, decoder).to(device)
    ours, feed = fuse_batchnorm(baseline), {"img_data": torch.randn(1, 3, *INPUT, device=device)}

    def baseline_logits():
        with mock.patch.object(pyramid, "conv_over_pyramid", pyramid.conv_over_resized):
            return baseline.logits(feed)

    return {
        "network, baseline": baseline_logits,
        "network, ours": lambda: ours.logits(feed),
        "end to end, baseline": lambda: F.interpolate(baseline_logits(), SIZE, mode="bilinear").softmax(1).argmax(1),
        "end to end, ours": lambda: label_map_from_logits([ours.logits(feed)[0]], SIZE),
    }


def main() -> None:
    args = parser_of(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for encoder, decoder in PAIRS:
        with torch.inference_mode():
            ms = interleaved(implementations_of(encoder, decoder, device), device, args.repeats)
        rows.append(
            {
                "network": f"{encoder} + {decoder}",
                **{f"{name} ms": value for name, value in ms.items()},
                "network, times faster": ms["network, baseline"] / ms["network, ours"],
                "end to end, times faster": ms["end to end, baseline"] / ms["end to end, ours"],
            }
        )
    write(args.json, f"inference, {SIZE[0]}x{SIZE[1]}", device, rows)


if __name__ == "__main__":
    main()
