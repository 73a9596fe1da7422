"""Measure the time and memory that the computation of a label map from logits needs.

    python benchmarks/label_map.py [--device cuda] [--json FILE]

The logits have 150 classes and stride 8, for an image of 512x683 pixels at one scale or at the five scales of ADE20K.
They are random (noise), or as smooth and confident as those of a trained network (smooth).

- baseline: resize the logits of all classes to the image size, softmax, mean over the scales, argmax.
- ours: `label_map_from_logits`, which does not store the probabilities of all classes at image size.

Memory is the increase of the peak memory during one call in a new process, and includes the label map.
"""

from functools import partial

import torch
import torch.nn.functional as F
from common import elsewhere, grown, interleaved, parser_of, write
from torch import Tensor

from mit_semseg.dataset.transforms import round_up, scale_for
from mit_semseg.evaluation.label_map import label_map_from_logits

SHORT_SIDES, LONGEST, STRIDE = (300, 375, 450, 525, 600), 1000, 8


def baseline(logits: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the label map (H, W) for a list of logits (C, h, w), one for each scale."""
    total = 0
    for x in logits:
        total = total + F.interpolate(x[None], size, mode="bilinear", align_corners=False).softmax(dim=1)
    return (total / len(logits)).argmax(dim=1)[0]


IMPLEMENTATIONS = {"baseline": baseline, "ours": label_map_from_logits}


def make_logits(
    kind: str, classes: int, size: tuple[int, int], scales: int, device: str, resized: bool = False
) -> list[Tensor]:
    """Return a list of logits (classes, h, w), one for each scale.

    Args:
        kind: "noise" or "smooth", see the module docstring.
        scales: number of scales, the largest ones of ADE20K. A single scale is the image size unless `resized` is set.
    """
    generator, logits = torch.Generator().manual_seed(0), []
    for short in SHORT_SIDES[-scales:] if scales > 1 or resized else (min(size),):
        scale = scale_for(size[1], size[0], short, LONGEST) if scales > 1 or resized else 1
        height, width = (round_up(int(side * scale), STRIDE) // STRIDE for side in size)
        if kind == "noise":
            x = 3 * torch.randn(classes, height, width, generator=generator)
        else:
            x = F.interpolate(7 * torch.randn(1, classes, 6, 8, generator=generator), (height, width), mode="bicubic")[
                0
            ]
        logits.append(x.to(device))
    return logits


def memory(name: str, arguments: tuple, size: tuple[int, int]) -> float:
    """Return by how many MiB one call of an implementation increases the peak memory."""
    logits = make_logits(*arguments)
    small = [x[:2, :4, :4].contiguous() for x in logits]
    IMPLEMENTATIONS[name](small, (8, 8))  # the first call loads libraries
    return grown(lambda: IMPLEMENTATIONS[name](logits, size), logits[0].device)


def main() -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 683), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, device, rows = tuple(args.size), torch.device(args.device), []
    for scales in (1, len(SHORT_SIDES)):
        for kind in ("noise", "smooth"):
            arguments = kind, args.classes, size, scales, args.device
            logits = make_logits(*arguments)
            calls = {name: partial(function, logits, size) for name, function in IMPLEMENTATIONS.items()}
            ms = interleaved(calls, device, args.repeats)
            mib = {name: elsewhere(memory, name, arguments, size) for name in IMPLEMENTATIONS}
            different = (calls["ours"]() != calls["baseline"]()).sum().item()
            rows.append(
                {
                    "logits": f"{kind}, {scales} scale{'s' * (scales > 1)}",
                    **{f"{name} ms": value for name, value in ms.items()},
                    "times faster": ms["baseline"] / ms["ours"],
                    **{f"{name} MiB": value for name, value in mib.items()},
                    "different pixels": different,
                }
            )
    write(args.json, f"label_map, {args.classes} classes, {size[0]}x{size[1]}", device, rows)


if __name__ == "__main__":
    main()
