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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import write
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RARE = ("pole", "sign symbol", "pedestrian", "bicyclist")
STEPS_PER_EPOCH = 50
SMOOTH = 3  # number of points that a plot averages
TRAIN_DRIVES, TEST_DRIVE = ("0016E5", "0006R0"), "0001TP"  # the names of images start with these
BASE = {
    "DATASET.list_train": "train",
    "DATASET.list_val": "val",
    "DATASET.num_class": 11,
    "DATASET.classes": "[sky,building,pole,road,pavement,tree,sign symbol,fence,car,pedestrian,bicyclist]",
    "DATASET.ignore_values": "[11]",
    "DATASET.imgSizes": 192,
    "TRAIN.optim": "AdamW",
    "TRAIN.batch_size_per_gpu": 4,
    "TRAIN.epoch_iters": STEPS_PER_EPOCH,
    "TRAIN.checkpoint_iters": 0,
    "TRAIN.workers": 1,
}
RANDOM_START = {
    **BASE,
    "MODEL.arch_encoder": "mobilenetv2dilated",
    "MODEL.arch_decoder": "c1_deepsup",
    "MODEL.pretrained": False,
    "TRAIN.lr_encoder": 0.002,
    "TRAIN.lr_decoder": 0.002,
}
PRETRAINED = {
    **BASE,
    "DATASET.segm_downsampling_rate": 4,
    "MODEL.arch_encoder": "efficientnet_lite0",
    "MODEL.arch_decoder": "upernet_tiny",
    "TRAIN.lr_encoder": 0.0005,
    "TRAIN.lr_decoder": 0.001,
    "TRAIN.loss": "ce+lovasz",
}
RECIPE = {"TRAIN.loss": "ce+lovasz", "TRAIN.class_weights": "auto", "TRAIN.ema": 0.99}
CROP = {"DATASET.random_scale": "(0.27,1.07)", "DATASET.crop_size": "(192,256)"}  # 0.5 to 2 times 192 pixels
JITTER, CLASS_MIX = {"DATASET.color_jitter": 0.4}, {"DATASET.class_mix": 0.5}
CROSS_ENTROPY = {"TRAIN.loss": "ce"}
WEIGHTS, SAMPLING = {"TRAIN.class_weights": "auto"}, {"DATASET.class_sampling": 0.1}


@dataclass(frozen=True)
class Variant:
    """A training run of an experiment.

    Attributes:
        steps: number of steps.
        options: options that differ from those of the experiment.
        train: script that trains, and its arguments.
        evaluate: run eval.py after the training; otherwise the training script writes the results.
    """

    steps: int
    options: Mapping[str, object]
    train: str = "train.py"
    evaluate: bool = True


@dataclass(frozen=True)
class Experiment:
    """Training runs that differ in some options.

    Attributes:
        options: options of all runs.
        variants: name -> run.
        drives: train on the images of `TRAIN_DRIVES` and evaluate on those of `TEST_DRIVE`.
    """

    options: Mapping[str, object]
    variants: Mapping[str, Variant]
    drives: bool = False


def augmentations(steps: int) -> Experiment:
    variants = {
        "none": Variant(steps, {"DATASET.random_flip": False}),
        "flip": Variant(steps, {}),
        "flip, scale and crop": Variant(steps, CROP),
        "flip, color jitter": Variant(steps, JITTER),
        "flip, RandAugment": Variant(steps, {}, "benchmarks/train_variant.py rand_augment"),
        "flip, ClassMix": Variant(steps, CLASS_MIX),
        "flip, scale and crop, color jitter": Variant(steps, {**CROP, **JITTER}),
        "flip, scale and crop, ClassMix": Variant(steps, {**CROP, **CLASS_MIX}),
        "flip, ClassMix, class sampling": Variant(steps, {**CLASS_MIX, **SAMPLING}),
    }
    return Experiment(PRETRAINED, variants)


def smp_variants(steps: int) -> dict[str, Variant]:
    options = {"DATASET.segm_downsampling_rate": 1}
    return {
        f"smp {architecture}, {loss}": Variant(
            steps, options, f"benchmarks/smp_training.py {architecture} {loss}", evaluate=False
        )
        for architecture in ("unet", "fpn", "deeplabv3plus")
        for loss in ("ce+dice", "ce+lovasz")
    }


EXPERIMENTS = {
    "random": Experiment(
        RANDOM_START,
        {
            "AdamW": Variant(800, {}),
            "recipe": Variant(800, RECIPE),
            "recipe, half the steps": Variant(400, RECIPE),
        },
    ),
    "augmentation-300": augmentations(300),
    "augmentation-2000": augmentations(2000),
    "rare": Experiment(
        PRETRAINED,
        {
            "cross entropy": Variant(800, CROSS_ENTROPY),
            "cross entropy, class weights": Variant(800, {**CROSS_ENTROPY, **WEIGHTS}),
            "cross entropy, class sampling": Variant(800, {**CROSS_ENTROPY, **SAMPLING}),
            "Lovasz": Variant(800, {}),
            "Lovasz, class weights": Variant(800, WEIGHTS),
            "Lovasz, class sampling": Variant(800, SAMPLING),
        },
    ),
    "pretrained": Experiment(
        {**PRETRAINED, "DATASET.imgSizes": "(240,300,360)"},
        {
            "own-folders.yaml": Variant(450, {}),
            "with class sampling": Variant(450, SAMPLING),
        },
    ),
    "aspp": Experiment(
        {**RANDOM_START, "MODEL.arch_decoder": "aspp", "MODEL.output_stride": 16},
        {
            "batch statistics": Variant(400, {}, "benchmarks/train_variant.py batch_statistics"),
            "running statistics": Variant(400, {}),
        },
    ),
    "smp": Experiment(PRETRAINED, {"ours": Variant(300, {}), **smp_variants(300)}),
    "drives": Experiment(
        PRETRAINED, {"ours": Variant(300, {}), "ours, cross entropy": Variant(300, CROSS_ENTROPY)}, drives=True
    ),
}


def run(options: Mapping[str, object], folder: Path, variant: Variant) -> dict[str, float]:
    """Train and evaluate a network unless `folder` contains the results. Return mean IoU, rare IoU and minutes."""
    path = folder / "learning.json"
    if not path.is_file():
        epochs, start = variant.steps // STEPS_PER_EPOCH, time.perf_counter()
        options = {**options, "TRAIN.num_epoch": epochs, "VAL.checkpoint": f"epoch_{epochs}.pth", "DIR": folder}
        words = [str(word) for pair in options.items() for word in pair]
        call(*variant.train.split(), *words, "TRAIN.resume", "restart", "--gpu", "cpu", "-q")
        minutes = (time.perf_counter() - start) / 60
        if variant.evaluate:
            call("eval.py", *words, "--gpu", "cpu", "-q")
        results = json.loads((folder / "result" / "results.json").read_text())
        rare = [row["iou"] for row in results["iou_per_class"] if row["class"] in RARE]
        row = {"mean IoU": results["mean_iou"], "rare": statistics.mean(rare), "minutes": minutes}
        path.write_text(json.dumps(row))
    return json.loads(path.read_text())


def call(script: str, *words: str) -> None:
    subprocess.run([sys.executable, ROOT / script, *words], check=True, cwd=ROOT)


def split_by_drive(data: Path, folder: Path) -> dict[str, Path]:
    """Write lists of the training images of `TRAIN_DRIVES` and of `TEST_DRIVE`; return the options that select them."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"DATASET.list_train": folder / "train.odgt", "DATASET.list_val": folder / "val.odgt"}
    for path, prefixes in zip(options.values(), (TRAIN_DRIVES, (TEST_DRIVE,)), strict=True):
        images = [image for image in sorted((data / "train/images").iterdir()) if image.name.startswith(prefixes)]
        labels = [f"train/annotations/{image.stem}.png" for image in images]
        records = [
            json.dumps({"fpath_img": f"train/images/{image.name}", "fpath_segm": label})
            for image, label in zip(images, labels, strict=True)
        ]
        path.write_text("\n".join(records) + "\n")
    return options


def plot_losses(variants: Mapping[str, Variant], seeds: Sequence[int], out: Path, path: Path) -> None:
    """Plot the training losses of all variants, averaged over the seeds and over `SMOOTH` points of the log."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, variant in variants.items():
        history = f"history_epoch_{variant.steps // STEPS_PER_EPOCH}.pth"
        runs = [torch.load(out / f"{name} {seed}" / history)["train"] for seed in seeds]
        steps, losses = (np.mean([run[key] for run in runs], axis=0) for key in ("epoch", "loss"))
        steps, losses = (np.convolve(x, np.ones(SMOOTH) / SMOOTH, "valid") for x in (steps, losses))
        axes.plot(steps * STEPS_PER_EPOCH, losses, label=name)
    axes.set(xlabel="step", ylabel="training loss", title=f"Mean of {len(seeds)} runs")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("ckpt/learning"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[304])
    parser.add_argument("--only", nargs="+", help="names of variants (default: all)")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also plot the training losses to this PNG file")
    args = parser.parse_args()
    experiment, rows, out = EXPERIMENTS[args.experiment], [], args.out.absolute() / args.experiment
    shared = {**experiment.options, "DATASET.root_dataset": args.data.absolute()}
    if experiment.drives:
        shared |= split_by_drive(args.data, out)
    for name in args.only or experiment.variants:
        variant = experiment.variants[name]
        options = {**shared, **variant.options}
        results = [run({**options, "TRAIN.seed": seed}, out / f"{name} {seed}", variant) for seed in args.seeds]
        ious = [100 * result["mean IoU"] for result in results]
        rows.append(
            {
                "Variant": name,
                "Steps": variant.steps,
                "Mean IoU, %": f"{statistics.mean(ious):.1f}",
                "Spread": f"{max(ious) - min(ious):.1f}",
                "Rare classes, %": f"{100 * statistics.mean(result['rare'] for result in results):.1f}",
                "Minutes": f"{statistics.mean(result['minutes'] for result in results):.1f}",
            }
        )
        print(rows[-1], flush=True)
    if args.plot:
        plot_losses(
            {name: experiment.variants[name] for name in args.only or experiment.variants}, args.seeds, out, args.plot
        )
    write(args.json, f"learning {args.experiment}", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
