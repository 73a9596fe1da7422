"""What does the way from logits to a label map cost, with and without the scores of all classes at the picture's size?

    python benchmarks/label_map.py [--device cuda] [--json FILE]

150 classes, a 512x683 picture, one scale (stride 8) and the five scales of ADE20K. Straightforward is: resize the
logits of all classes to the picture, softmax, mean over the scales, arg-max. Both ways take turns; memory is the growth
of the largest resident size in a fresh process (or, on a GPU, the largest allocation), with the result in it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from common import elsewhere, grown, interleaved, parser_of, write
from torch import Tensor

from mit_semseg.dataset.transforms import round_up, scale_for
from mit_semseg.evaluation.label_map import label_map_from_logits

SHORT_SIDES, LONGEST, STRIDE = (300, 375, 450, 525, 600), 1000, 8


def straightforward(logits: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The plain way."""
    total = 0
    for x in logits:
        total = total + F.interpolate(x[None], size, mode="bilinear", align_corners=False).softmax(dim=1)
    return (total / len(logits)).argmax(dim=1)[0]


WAYS = {"straightforward": straightforward, "ours": label_map_from_logits}


def make_logits(
    kind: str, classes: int, size: tuple[int, int], scales: int, device: str, resized: bool = False
) -> list[Tensor]:
    """Noise, or maps as smooth and as certain as a trained network's.

    Args:
        scales: the last so many of ADE20K's; one is the picture's own size, unless it is `resized`, too.
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


def memory(way: str, arguments: tuple, size: tuple[int, int]) -> float:
    """MiB that one call adds, in this process."""
    logits = make_logits(*arguments)
    small = [x[:2, :4, :4].contiguous() for x in logits]
    WAYS[way](small, (8, 8))  # whatever is loaded at the first call
    return grown(lambda: WAYS[way](logits, size), logits[0].device)


def main() -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 683), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, device, rows = tuple(args.size), torch.device(args.device), []
    for scales in (1, len(SHORT_SIDES)):
        for kind in ("noise", "trained"):
            arguments = kind, args.classes, size, scales, args.device
            logits = make_logits(*arguments)
            ways = {name: partial(way, logits, size) for name, way in WAYS.items()}
            ms = interleaved(ways, device, args.repeats)
            mib = {name: elsewhere(memory, name, arguments, size) for name in WAYS}
            differ = (ways["ours"]() != ways["straightforward"]()).sum().item()
            rows.append(
                {
                    "logits": f"{kind}, {scales} scale{'s' * (scales > 1)}",
                    **{f"{name} ms": value for name, value in ms.items()},
                    "times faster": ms["straightforward"] / ms["ours"],
                    **{f"{name} MiB": value for name, value in mib.items()},
                    "pixels that differ": differ,
                }
            )
    write(args.json, f"label_map, {args.classes} classes, {size[0]}x{size[1]}", device, rows)


if __name__ == "__main__":
    main()
