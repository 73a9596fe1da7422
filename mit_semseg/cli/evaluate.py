"""Evaluate a checkpoint and write its report, for eval.py and eval_multipro.py."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..build import build_module, build_val_dataset, inference_options, load_options
from ..config import Config
from ..dataset import ValDataset
from ..engine import World
from ..evaluation import Predictor, evaluate
from ..evaluation.evaluator import Evaluation
from ..lib.utils import UTF8, atomic_write, progress_bar
from ..predict.results import save_png, unique_stems
from ..predict.visualize import result_panel
from .devices import describe_all
from .report import write_report
from .workers import BackgroundWriter, Shard, run_sharded

logger = logging.getLogger(__name__)


def run(cfg: Config, world: World, config_path: str | None) -> int:
    """Evaluate VAL.checkpoint on the validation set, print the scores and write the report to DIR/result.

    Every image is scored or skipped exactly once and counts are added up, so that scores do not depend on the number
    of devices.

    Returns:
        Exit code: 1 if images were skipped, else 0.

    Raises:
        UserError: weights or images cannot be used, or a worker ended.
    """
    logger.info("devices: %s", describe_all(world))
    dataset = build_val_dataset(cfg)
    own = len(dataset.shard(world.rank, world.size))
    with progress_bar(total=own, desc="evaluating", unit="img", shown=world.is_main) as bar:
        shards = run_sharded(evaluate_shard, world, len(dataset), (cfg, dataset), lambda name: bar.update())
    evaluation = Evaluation.merge(shards)
    if world.is_main:
        report(cfg, config_path, evaluation, dataset)
    return 1 if evaluation.skipped else 0


def evaluate_shard(shard: Shard, report_image: Callable[[str], None], cfg: Config, dataset: ValDataset) -> Evaluation:
    """Evaluate a shard of the validation set; with VAL.visualize write a panel per image."""
    stems = _panel_stems(dataset)

    def write_panel(item, prediction):
        save_png(result_panel(item, prediction, dataset.table), Path(cfg.DIR, "result", f"{stems[item['info']]}.png"))
        report_image(item["info"])

    def on_result(item, prediction):
        if cfg.VAL.visualize and prediction is not None:
            writer.submit(partial(write_panel, item, prediction))
        else:
            report_image(item["info"])

    module = build_module(cfg, shard.device, checkpoint=cfg.VAL.checkpoint)
    with BackgroundWriter() as writer:
        return evaluate(
            Predictor(module, shard.device, inference_options(cfg)),
            dataset.shard(shard.index, shard.count),
            loading=load_options(cfg, cfg.VAL.batch_size, shard.local_size),
            progress=False,
            on_result=on_result,
        )


def _panel_stems(dataset: ValDataset) -> dict[str, Path]:
    """Path of every image's panel, without extension, relative to DIR/result."""
    return unique_stems([record["fpath_img"] for record in dataset.records])


def report(cfg: Config, config_path: str | None, evaluation: Evaluation, dataset: ValDataset) -> None:
    """Print the scores and write results.json, report.html and confusion.png."""
    print(evaluation.report())
    folder = Path(cfg.DIR, "result")
    with atomic_write(folder / "results.json") as partial_path:
        keys = "root_dataset", "list_val", "imgSizes", "imgMaxSize"
        options = {key: cfg.DATASET[key] for key in keys} | cfg.INFERENCE
        content = {"config": config_path, "checkpoint": cfg.VAL.checkpoint, "options": options, **evaluation.as_dict()}
        partial_path.write_text(json.dumps(content, indent=1, ensure_ascii=False), **UTF8)
    panels: dict[str, str] = {}
    if cfg.VAL.visualize:
        panels = {name: f"{stem.as_posix()}.png" for name, stem in _panel_stems(dataset).items()}
    write_report(evaluation, folder, f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DIR}", panels)
    files: Sequence[str] = ("results.json", "report.html", "confusion.png", *(["a panel per image"] if panels else []))
    print(f"Written to {folder}: {', '.join(files)}")
