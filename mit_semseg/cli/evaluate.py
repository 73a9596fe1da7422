"""What eval.py and eval_multipro.py share: scoring a checkpoint on one device or several, and writing the figures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..build import build_module, inference_options
from ..config import Config, load_config
from ..dataset import ValDataset
from ..engine import Processes
from ..evaluation import evaluate
from ..evaluation.evaluator import Evaluation
from ..lib.utils import TEXT, atomic_write, progress_bar
from ..predict.visualize import result_panel, result_stems, save_png
from .background import Background
from .report import write_report
from .workers import Share, share_out


def result_folder(cfg: Config) -> Path:
    """Where the figures and panels of an evaluation go."""
    return Path(cfg.DIR, "result")


def _dataset(cfg: Config) -> ValDataset:
    return ValDataset(cfg.DATASET.root_dataset, cfg.DATASET.list_val, cfg.DATASET)


def _score_share(share: Share, send: Callable, path: str | None, opts: Sequence[str]) -> Evaluation:
    """Score a share of the validation list; sends the name of every image done."""
    cfg = load_config(path, opts)
    dataset, results = _dataset(cfg), result_folder(cfg)
    names = result_stems([record["fpath_img"] for record in dataset.records])
    module = build_module(cfg, share.device, checkpoint=cfg.VAL.checkpoint)

    with Background() as later:

        def write(item, prediction):
            save_png(result_panel(item, prediction, dataset.table), results / f"{names[item['info']]}.png")
            send(item["info"])

        def seen(item, prediction):
            if cfg.VAL.visualize and prediction is not None:
                later(lambda: write(item, prediction))
            else:
                send(item["info"])

        return evaluate(
            module,
            dataset.shard(share.number, share.parts),
            device=share.device,
            view=inference_options(cfg),
            batch_size=cfg.VAL.batch_size,
            workers=cfg.TRAIN.workers,
            timeout=cfg.RUNTIME.timeout,
            processes=share.local,
            progress=False,
            on_result=seen,
        )


def score(
    path: str | None, opts: Sequence[str], devices: Sequence[torch.device], processes: Processes | None = None
) -> Evaluation:
    """Evaluate VAL.checkpoint on the validation list; with VAL.visualize write a panel per picture.

    Every picture is scored, or left out with a sentence (DATASET.on_error skip), exactly once, and the counts of all
    shares are added up: the figures do not depend on the number of devices.

    Args:
        path, opts: as for `load_config`.
        devices: of this process; several are worked on by one process each.
        processes: of the job, each of which scores a share; None for this one alone.

    Raises:
        UserError: weights or data cannot be used, or a process failed or was killed.
    """
    processes = processes or Processes()
    dataset = _dataset(load_config(path, opts))
    own = len(dataset.shard(processes.rank, processes.size))
    with progress_bar(total=own, desc="evaluating", unit="img", shown=processes.main) as bar:
        arguments = path, list(opts)
        shares = share_out(_score_share, devices, processes, len(dataset), arguments, lambda name: bar.update())
    evaluation = Evaluation.merged(shares)
    counted = evaluation.images + len(evaluation.skipped) - len(dataset.skipped)
    assert counted == len(dataset), "every image is scored or left out exactly once"
    return evaluation


def report(cfg: Config, config_path: str | None, evaluation: Evaluation) -> None:
    """Print the figures and write them to results.json and a page, report.html."""
    print(evaluation.report())
    results = result_folder(cfg)
    with atomic_write(results / "results.json") as partial:
        how = {key: cfg.DATASET[key] for key in ("root_dataset", "list_val", "imgSizes", "imgMaxSize")} | cfg.INFERENCE
        content = {"config": config_path, "checkpoint": cfg.VAL.checkpoint, "options": how, **evaluation.as_dict()}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), **TEXT)
    names = result_stems([record["fpath_img"] for record in _dataset(cfg).records]) if cfg.VAL.visualize else {}
    panels = {name: f"{stem.as_posix()}.png" for name, stem in names.items()}
    write_report(evaluation, results, f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DIR}", panels)
    more = ", a panel per image" if cfg.VAL.visualize else ""
    print(f"Written to {results}: results.json, report.html, confusion.png{more}")
