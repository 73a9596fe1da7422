"""Evaluate a checkpoint and write a report; used by eval.py and eval_multipro.py."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..build import build_module, build_val_dataset, inference_options, load_options
from ..config import Config
from ..dataset import ValDataset
from ..engine import RunFolder, World
from ..evaluation import Predictor, evaluate
from ..evaluation.evaluator import Evaluation
from ..evaluation.temperature import fit_temperature, sample_logits
from ..lib.utils import UTF8, UserError, atomic_write, progress_bar
from ..predict.results import save_png, unique_stems
from ..predict.visualize import draw_doubt, result_panel
from .devices import describe_all
from .report import write_report
from .workers import Shard, background_writer, run_sharded

logger = logging.getLogger(__name__)

FIT_PIXELS = 100_000  # approximate number of pixels on which a temperature is fitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the evaluation scripts."""
    text = "first fit a temperature that calibrates class probabilities; it is saved next to the checkpoint"
    parser.add_argument("--fit-temperature", action="store_true", help=text)


def run(cfg: Config, world: World, args: argparse.Namespace) -> int:
    """Evaluate VAL.checkpoint, print the metrics, write the report to DIR/result, and return the exit code.

    Pixel counts are summed over all devices, so the metrics do not depend on the number of devices.
    """
    logger.info("devices: %s", describe_all(world))
    dataset = build_val_dataset(cfg)
    temperature = fit(cfg, world, dataset) if args.fit_temperature else None
    stems = unique_stems([record["fpath_img"] for record in dataset.records] if cfg.VAL.visualize else [])
    own = len(dataset.shard(world.rank, world.size))
    with progress_bar(total=own, desc="evaluating", unit="img", shown=world.is_main) as bar:
        shards = run_sharded(
            evaluate_shard, world, len(dataset), (cfg, dataset, stems, temperature), lambda name: bar.update()
        )
    evaluation = Evaluation.merge(shards)
    if world.is_main:
        report(cfg, args.cfg, evaluation, dataset, stems)
    return 1 if evaluation.skipped else 0


def fit(cfg: Config, world: World, dataset: ValDataset) -> float:
    """Fit the temperature of VAL.checkpoint on the validation set, save it next to the checkpoint, and return it."""
    if inference_options(cfg).window_size:
        raise UserError(
            "--fit-temperature does not support sliding windows; set INFERENCE.window_size 0 to fit the temperature, "
            "which is then also used with sliding windows"
        )
    parts = run_sharded(sample_shard, world, len(dataset), (cfg, dataset), lambda name: None)
    parts = [part for part in parts if len(part[1])]
    if not parts:
        raise UserError("--fit-temperature: no pixel of the validation set is labelled; check the label files")
    logits, labels = zip(*parts, strict=True)
    logits = [torch.from_numpy(np.concatenate(scale, axis=1)) for scale in zip(*logits, strict=True)]
    result = fit_temperature(logits, torch.from_numpy(np.concatenate(labels)))
    if world.is_main:
        print(f"Temperature {result.value:.3f}, fitted on {result.pixels} pixels")
        print(f"  negative log-likelihood: {result.nll[0]:.4f}, with the temperature {result.nll[1]:.4f}")
        errors = (f"{100 * error:.2f} %" for error in result.error)
        print("  expected calibration error: {}, with the temperature {}".format(*errors))
        path = RunFolder(cfg.DIR).temperature_path(cfg.VAL.checkpoint)
        content = {"temperature": result.value, "nll": result.nll, "expected_calibration_error": result.error}
        with atomic_write(path) as partial_path:
            partial_path.write_text(json.dumps(content, indent=1), **UTF8)
        print(f"  written to {path}")
    return result.value


def sample_shard(
    shard: Shard, report_image: Callable[[str], None], cfg: Config, dataset: ValDataset
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return logits and labels of the pixels that `sample_logits` chooses in a shard."""
    predictor = Predictor(
        build_module(cfg, shard.device, checkpoint=cfg.VAL.checkpoint), shard.device, inference_options(cfg)
    )
    loading = load_options(cfg, cfg.VAL.batch_size, shard.local_size)
    pixels = FIT_PIXELS // len(dataset) + 1
    logits, label = sample_logits(predictor, dataset.shard(shard.index, shard.count), pixels, loading)
    return [x.numpy() for x in logits], label.numpy()


def evaluate_shard(
    shard: Shard,
    report_image: Callable[[str], None],
    cfg: Config,
    dataset: ValDataset,
    stems: dict[str, Path],
    temperature: float | None,
) -> Evaluation:
    """Evaluate a shard of the validation set. Unless `stems` is empty, also write a panel for every image.

    `temperature` replaces the temperature of the checkpoint, unless it is None.
    """

    def write_panel(item, prediction):
        save_png(result_panel(item, prediction, dataset.table), Path(cfg.DIR, "result", f"{stems[item['info']]}.png"))

    def on_result(item, prediction):
        if stems and prediction is not None:
            submit(write_panel, item, prediction)
        report_image(item["info"])

    module = build_module(cfg, shard.device, checkpoint=cfg.VAL.checkpoint)
    module.temperature = temperature or module.temperature
    with background_writer() as submit:
        return evaluate(
            Predictor(module, shard.device, inference_options(cfg)),
            dataset.shard(shard.index, shard.count),
            loading=load_options(cfg, cfg.VAL.batch_size, shard.local_size),
            progress=False,
            diagnostics=True,
            on_result=on_result,
        )


def report(
    cfg: Config, config_path: str | None, evaluation: Evaluation, dataset: ValDataset, stems: dict[str, Path]
) -> None:
    """Print the metrics and write results.json, report.html and the pictures of the report to DIR/result.

    `stems` maps image paths to paths of panels, which have no suffix and are relative to DIR/result.
    """
    print(evaluation.report())
    folder = Path(cfg.DIR, "result")
    with atomic_write(folder / "results.json") as partial_path:
        split = ("list_train", "val_fraction", "val_groups", "val_seed") if cfg.DATASET.val_fraction else ("list_val",)
        keys = "root_dataset", *split, "imgSizes", "imgMaxSize"
        options = {key: cfg.DATASET[key] for key in keys} | cfg.INFERENCE
        content = {"config": config_path, "checkpoint": cfg.VAL.checkpoint, "options": options, **evaluation.as_dict()}
        partial_path.write_text(json.dumps(content, indent=1, ensure_ascii=False), **UTF8)
    panels = {name: f"{stem.as_posix()}.png" for name, stem in stems.items()}
    doubtful = write_doubtful(evaluation, dataset, folder)
    title = f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DIR}"
    write_report(evaluation, folder, title, panels, doubtful)
    more = ", a panel per image" if panels else ""
    print(f"Written to {folder}: results.json, report.html, confusion.png, calibration.png{more}")


def write_doubtful(evaluation: Evaluation, dataset: ValDataset, folder: Path) -> list[str]:
    """Write a panel [image | label | prediction | doubtful pixels] for every doubtful label; return the file names."""
    records, names = {record["fpath_img"]: record for record in dataset.records}, []
    for rank, entry in enumerate(evaluation.diagnostics.doubtful, start=1):
        image, label, table = dataset.load_pair(records[entry.name])
        item = {
            "img_ori": np.asarray(dataset.to_rgb(image)),
            "seg_label": torch.from_numpy(table.encode(np.asarray(label)))[None],
        }
        picture = result_panel(item, entry.label_map, dataset.table, [draw_doubt(item["img_ori"], entry.given)])
        names.append(f"doubtful/{rank}.png")
        save_png(picture, folder / names[-1])
    return names
