"""Count the source files in which a call runs functions of the package. Fewer files are easier to follow.

    python benchmarks/files_crossed.py [-v]

The calls use the quick-start network with random weights, and synthetic scenes. Only functions that run in this
process count. The exit code is 1 if a call uses more files than allowed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mit_semseg import Segmenter, build
from mit_semseg.config import load_config
from mit_semseg.dataset.synthetic import write_dataset
from mit_semseg.engine import RunFolder, Trainer
from mit_semseg.engine.train_step import LossWeights
from mit_semseg.evaluation import Predictor, evaluate
from mit_semseg.lib import opencv

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mit_semseg"
LIMITS = {"train_step": 10, "fit with one step": 18, "evaluate": 14, "Segmenter(path)": 12}  # most files


def files_of(call: Callable[[], object]) -> list[str]:
    """Return the source files whose functions a call runs, as paths relative to the package."""
    found = set()

    def record(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            found.add(Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(found)


def measure(folder: Path) -> dict[str, list[str]]:
    """Return a list of source files for each call, by the name of the call."""
    write_dataset(folder / "data", train=8, val=2)
    changes = ["DATASET.root_dataset", folder / "data", "DATASET.classes", folder / "data/classes.csv", "DIR", folder]
    changes += ["TRAIN.num_epoch", 1, "TRAIN.epoch_iters", 1, "TRAIN.eval_epoch", 0]
    cfg = load_config(ROOT / "config" / "quickstart.yaml", [str(word) for word in changes])
    device = torch.device("cpu")
    dataset, _ = build.build_data(cfg)
    module = build.build_module(cfg, device)
    trainers = [Trainer(module, *build_run(cfg, module, dataset, folder / name)) for name in ("step", "fit")]
    trainer, batches = trainers[0], [[dataset[0]]]
    weights, moved = LossWeights(batches, module.crit, trainer.world, False), [trainer.to_devices(batches[0])]
    val_dataset, inference = build.build_val_dataset(cfg), build.inference_options(cfg)
    predictor = Predictor(module, device, inference)
    segmenter = Segmenter(module, val_dataset.table, cfg.DATASET, inference=inference)
    opencv.getNumThreads()  # import OpenCV before the measurement
    image = str(val_dataset.path(val_dataset.records[0], "fpath_img"))
    calls = {
        "train_step": lambda: trainer.train_step(moved, weights),
        "fit with one step": lambda: trainers[1].fit(dataset),
        "evaluate": lambda: evaluate(predictor, val_dataset),
        "Segmenter(path)": lambda: segmenter(image),
    }
    return {name: files_of(call) for name, call in calls.items()}


def build_run(cfg, module, dataset, folder: Path) -> tuple:
    """Return the optimizer, folder and options of a training run."""
    optimizer, options = build.build_training(cfg, module, dataset.num_sample, 1)
    return optimizer, RunFolder(folder), options


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="store_true", help="print the names of the files")
    verbose = parser.parse_args().verbose
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    print("| call | files | allowed |\n| --- | --- | --- |")
    for name, files in result.items():
        print(f"| {name} | {len(files)} | {LIMITS[name]} |")
        if verbose:
            print("  " + "\n  ".join(files))
    return int(any(len(files) > LIMITS[name] for name, files in result.items()))


if __name__ == "__main__":
    sys.exit(main())
