"""Measure which training options increase the mean IoU on CamVid.

    python benchmarks/learning.py EXPERIMENT --data data/camvid [--seeds 1 2 3] [--only VARIANT ...] [--json FILE]

`--data` is a folder with train/ and val/, each with images/ and annotations/, as described in docs/own-data.md. Every
variant is trained by train.py and evaluated by eval.py on the same validation images. Finished runs in `--out` are not
repeated. An experiment takes between half an hour and several hours on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from common import write

ROOT = Path(__file__).resolve().parents[1]
RARE = ("pole", "sign symbol", "pedestrian", "bicyclist")
STEPS_PER_EPOCH = 50
BASE = {
    "DATASET.list_train": "train",
    "DATASET.list_val": "val",
    "DATASET.num_class": 11,
    "DATASET.classes": "[sky,building,pole,road,pavement,tree,sign symbol,fence,car,pedestrian,bicyclist]",
    "DATASET.ignore_values": "[11]",
    "TRAIN.optim": "AdamW",
    "TRAIN.batch_size_per_gpu": 4,
    "TRAIN.epoch_iters": STEPS_PER_EPOCH,
    "TRAIN.checkpoint_iters": 0,
    "TRAIN.workers": 1,
}
RANDOM_START = {
    **BASE,
    "DATASET.imgSizes": 192,
    "MODEL.arch_encoder": "mobilenetv2dilated",
    "MODEL.arch_decoder": "c1_deepsup",
    "MODEL.pretrained": False,
    "TRAIN.lr_encoder": 0.002,
    "TRAIN.lr_decoder": 0.002,
}


@dataclass(frozen=True)
class Experiment:
    """Training runs that differ in some options.

    Attributes:
        options: options that all runs share.
        variants: for every run, its number of steps and its options.
    """

    options: Mapping[str, object]
    variants: Mapping[str, tuple[int, Mapping[str, object]]]


RECIPE: dict[str, object] = {"TRAIN.loss": "ce+lovasz", "TRAIN.class_weights": "auto", "TRAIN.ema": 0.99}
EXPERIMENTS = {
    "random": Experiment(
        RANDOM_START,
        {
            "SGD": (800, {"TRAIN.optim": "SGD", "TRAIN.lr_encoder": 0.02, "TRAIN.lr_decoder": 0.02}),
            "AdamW": (800, {}),
            "recipe": (800, RECIPE),
            "recipe, half the steps": (400, RECIPE),
        },
    ),
}


def run(options: Mapping[str, object], folder: Path, steps: int) -> dict[str, float]:
    """Train and evaluate a network unless `folder` contains the results. Return mean IoU, rare IoU and minutes."""
    path = folder / "learning.json"
    if not path.is_file():
        epochs, start = steps // STEPS_PER_EPOCH, time.perf_counter()
        words = {**options, "TRAIN.num_epoch": epochs, "VAL.checkpoint": f"epoch_{epochs}.pth", "DIR": folder}
        words = [str(word) for pair in words.items() for word in pair]
        call("train.py", "--gpu", "cpu", *words, "TRAIN.resume", "restart")
        minutes = (time.perf_counter() - start) / 60
        call("eval.py", "--gpu", "cpu", *words)
        results = json.loads((folder / "result" / "results.json").read_text())
        rare = [row["iou"] for row in results["iou_per_class"] if row["class"] in RARE]
        row = {"mean IoU": results["mean_iou"], "rare": statistics.mean(rare), "minutes": minutes}
        path.write_text(json.dumps(row))
    return json.loads(path.read_text())


def call(script: str, *words: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "-q", *words], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("ckpt/learning"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[304])
    parser.add_argument("--only", nargs="+", help="names of variants (default: all)")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    experiment, rows = EXPERIMENTS[args.experiment], []
    for name in args.only or experiment.variants:
        steps, changes = experiment.variants[name]
        options = {**experiment.options, "DATASET.root_dataset": args.data.absolute(), **changes}
        results = [
            run({**options, "TRAIN.seed": seed}, args.out.absolute() / args.experiment / f"{name} {seed}", steps)
            for seed in args.seeds
        ]
        ious = [100 * result["mean IoU"] for result in results]
        rows.append(
            {
                "Variant": name,
                "Steps": steps,
                "Mean IoU, %": f"{statistics.mean(ious):.1f}",
                "Spread": f"{max(ious) - min(ious):.1f}",
                "Rare classes, %": f"{100 * statistics.mean(result['rare'] for result in results):.1f}",
                "Minutes": f"{statistics.mean(result['minutes'] for result in results):.1f}",
            }
        )
        print(rows[-1], flush=True)
    write(args.json, f"learning {args.experiment}", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
