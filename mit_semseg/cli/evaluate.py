"""Evaluate a checkpoint and write a report; used by eval.py and eval_multipro.py."""

import json
import logging
from collections.abc import Callable
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
from .workers import Shard, background_writer, run_sharded

logger = logging.getLogger(__name__)


def run(cfg: Config, world: World, config_path: str | None) -> int:
    """Evaluate VAL.checkpoint, print the metrics, write the report to DIR/result, and return the exit code.

    Pixel counts are summed over all devices, so the metrics do not depend on the number of devices.
    """
    logger.info("devices: %s", describe_all(world))
    dataset = build_val_dataset(cfg)
    stems = unique_stems([record["fpath_img"] for record in dataset.records] if cfg.VAL.visualize else [])
    own = len(dataset.shard(world.rank, world.size))
    with progress_bar(total=own, desc="evaluating", unit="img", shown=world.is_main) as bar:
        shards = run_sharded(evaluate_shard, world, len(dataset), (cfg, dataset, stems), lambda name: bar.update())
    evaluation = Evaluation.merge(shards)
    if world.is_main:
        report(cfg, config_path, evaluation, stems)
    return 1 if evaluation.skipped else 0


def evaluate_shard(
    shard: Shard, report_image: Callable[[str], None], cfg: Config, dataset: ValDataset, stems: dict[str, Path]
) -> Evaluation:
    """Evaluate a shard of the validation set. Unless `stems` is empty, also write a panel for every image."""

    def write_panel(item, prediction):
        save_png(result_panel(item, prediction, dataset.table), Path(cfg.DIR, "result", f"{stems[item['info']]}.png"))

    def on_result(item, prediction):
        if stems and prediction is not None:
            submit(write_panel, item, prediction)
        report_image(item["info"])

    module = build_module(cfg, shard.device, checkpoint=cfg.VAL.checkpoint)
    with background_writer() as submit:
        return evaluate(
            Predictor(module, shard.device, inference_options(cfg)),
            dataset.shard(shard.index, shard.count),
            loading=load_options(cfg, cfg.VAL.batch_size, shard.local_size),
            progress=False,
            on_result=on_result,
        )


def report(cfg: Config, config_path: str | None, evaluation: Evaluation, stems: dict[str, Path]) -> None:
    """Print the metrics and write results.json, report.html and confusion.png to DIR/result.

    `stems` maps image paths to paths of panels, which have no suffix and are relative to DIR/result.
    """
    print(evaluation.report())
    folder = Path(cfg.DIR, "result")
    with atomic_write(folder / "results.json") as partial_path:
        keys = "root_dataset", "list_val", "imgSizes", "imgMaxSize"
        options = {key: cfg.DATASET[key] for key in keys} | cfg.INFERENCE
        content = {"config": config_path, "checkpoint": cfg.VAL.checkpoint, "options": options, **evaluation.as_dict()}
        partial_path.write_text(json.dumps(content, indent=1, ensure_ascii=False), **UTF8)
    panels = {name: f"{stem.as_posix()}.png" for name, stem in stems.items()}
    write_report(evaluation, folder, f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DIR}", panels)
    print(f"Written to {folder}: results.json, report.html, confusion.png{', a panel per image' if panels else ''}")
