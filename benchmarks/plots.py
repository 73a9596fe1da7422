"""Plot the time and memory that label maps need, against image size, number of classes and number of scales.

    python benchmarks/plots.py [--device cuda] [--out docs/images/label_map_costs.png] [--json FILE]

Compares the two implementations in label_map.py for images of 0.1 to 24 megapixels, 2 to 1,000 classes and 1 to 5
scales. The baseline is not measured where it would need more than `--max-memory` MiB.
"""

from functools import partial
from pathlib import Path

import torch
from common import elsewhere, hardware, interleaved, parser_of, write
from label_map import IMPLEMENTATIONS, SHORT_SIDES, make_logits, memory
from matplotlib.figure import Figure

SIZE, CLASSES = (512, 683), 150
MEGAPIXELS = (0.1, 0.35, 1, 3, 8, 24)
SWEEPS = {
    "megapixels": [
        (m, (round((m * 1e6 * 3 / 4) ** 0.5), round((m * 1e6 * 4 / 3) ** 0.5)), CLASSES) for m in MEGAPIXELS
    ],
    "classes": [(c, SIZE, c) for c in (2, 19, 60, 150, 400, 1000)],
    "scales": [(s, SIZE, CLASSES) for s in range(1, 1 + len(SHORT_SIDES))],
}
COLORS = {"baseline": "tab:red", "ours": "tab:blue"}


def measure(sweep: str, max_memory: float, repeats: int, device: torch.device) -> list[dict]:
    """Return rows with the time and memory of each implementation at each point of a sweep."""
    rows = []
    for x, size, classes in SWEEPS[sweep]:
        for scales in (x,) if sweep == "scales" else (1, len(SHORT_SIDES)):
            # The baseline stores the resized logits, their softmax and, with several scales, the sum.
            large = 4 * size[0] * size[1] * classes * (2 + (scales > 1)) / 2**20 > max_memory
            names = ["ours"] if large else list(IMPLEMENTATIONS)
            arguments = "smooth", classes, size, scales, device.type, True
            logits = make_logits(*arguments)
            ms = interleaved({name: partial(IMPLEMENTATIONS[name], logits, size) for name in names}, device, repeats)
            for name in names:
                mib = elsewhere(memory, name, arguments, size)
                rows.append(
                    {
                        "sweep": sweep,
                        "x": float(x),
                        "scales": scales,
                        "implementation": name,
                        "ms": ms[name],
                        "MiB": mib,
                    }
                )
            print(rows[-1], flush=True)
    return rows


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Save a figure with a column for each sweep, in which time is plotted above memory."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    for column, sweep in enumerate(SWEEPS):
        for line, (key, ylabel) in enumerate((("ms", "time, ms"), ("MiB", "memory, MiB"))):
            axes = figure.add_subplot(2, len(SWEEPS), 1 + column + line * len(SWEEPS))
            for name, color in COLORS.items():
                for scales in sorted({row["scales"] for row in rows}) if sweep != "scales" else (None,):
                    own = [r for r in rows if r["sweep"] == sweep and r["implementation"] == name]
                    own = [r for r in own if scales is None or r["scales"] == scales]
                    if own:
                        style = {
                            "color": color,
                            "marker": "o",
                            "markersize": 4,
                            "linestyle": "-" if scales != 1 else ":",
                        }
                        label = name if scales is None else f"{name}, {scales} scale{'s' * (scales > 1)}"
                        axes.plot([r["x"] for r in own], [max(r[key], 0.1) for r in own], label=label, **style)
            axes.set(xlabel=sweep, ylabel=ylabel if column == 0 else "", yscale="log")
            if sweep != "scales":
                axes.set_xscale("log")
                axes.set_xticks([x for x, *_ in SWEEPS[sweep]], [f"{x:g}" for x, *_ in SWEEPS[sweep]], minor=False)
                axes.minorticks_off()
            axes.grid(alpha=0.3)
            if line == 0:
                axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument("--max-memory", type=float, default=6000, help="MiB that the baseline may use (default: 6000)")
    parser.add_argument("--out", default="docs/images/label_map_costs.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rows = [row for sweep in SWEEPS for row in measure(sweep, args.max_memory, args.repeats, device)]
    draw(rows, f"From logits to a label map: {hardware(device)}, PyTorch {torch.__version__}", Path(args.out))
    write(args.json, "plots", device, rows)


if __name__ == "__main__":
    main()
