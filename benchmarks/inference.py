"""What does a picture cost from the network's input to the label map?

    python benchmarks/inference.py [--device cuda] [--json FILE]

Networks of random weights, a 512x683 picture, one scale. Straightforward: the network as it was trained (float32,
channels first, its pyramid resized and concatenated), scores of all classes resized to the picture, softmax, arg-max.
Ours: batch norms folded, channels last, pyramid folded, label map from the logits. Network and label map are also
measured by themselves. All ways take turns.
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


def ways_of(encoder: str, decoder: str, device: torch.device) -> dict:
    """Calls of the network alone and of the whole way, plain and ours."""
    plain = network_of(encoder, decoder).to(device)
    ours, feed = fuse_batchnorm(plain), {"img_data": torch.randn(1, 3, *INPUT, device=device)}

    def plain_logits():
        with mock.patch.object(pyramid, "conv_over_pyramid", pyramid.conv_over_resized):
            return plain.logits(feed)

    return {
        "plain network": plain_logits,
        "our network": lambda: ours.logits(feed),
        "plain whole": lambda: F.interpolate(plain_logits(), SIZE, mode="bilinear").softmax(1).argmax(1),
        "our whole": lambda: label_map_from_logits([ours.logits(feed)[0]], SIZE),
    }


def main() -> None:
    args = parser_of(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for encoder, decoder in PAIRS:
        with torch.inference_mode():
            ms = interleaved(ways_of(encoder, decoder, device), device, args.repeats)
        rows.append(
            {
                "network": f"{encoder} + {decoder}",
                **{f"{name} ms": value for name, value in ms.items()},
                "network, times faster": ms["plain network"] / ms["our network"],
                "whole, times faster": ms["plain whole"] / ms["our whole"],
            }
        )
    write(args.json, f"inference, {SIZE[0]}x{SIZE[1]}", device, rows)


if __name__ == "__main__":
    main()
