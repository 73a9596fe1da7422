"""What eval.py and eval_multipro.py share: scoring a checkpoint, on one device or several, and writing the figures."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch

from ..config import Config, load_config
from ..dataset import ValDataset
from ..evaluation import evaluate
from ..evaluation.evaluator import MOST_WORKERS, Evaluation
from ..lib.utils import UserError, available_cores, whole_file
from .cli import build_module, setup_logger
from .visualize import result_names, result_panel, save_picture


def result_folder(cfg: Config) -> Path:
    """Where the figures and panels of an evaluation go."""
    return Path(cfg.DIR, "result")


def score(cfg: Config, device: torch.device, *, shard: range | None = None, workers: int = MOST_WORKERS) -> Evaluation:
    """Evaluate VAL.checkpoint on the validation list; with VAL.visualize write a panel per picture.

    Args:
        cfg: configuration.
        device: to work on.
        shard: positions in the list to take; None takes all. Of several, the first shows its progress.
        workers: loader processes.
    """
    data, results = cfg.DATASET, result_folder(cfg)
    dataset = ValDataset(data.root_dataset, data.list_val, data)
    names = result_names([record["fpath_img"] for record in dataset.records])
    if shard is not None:
        dataset.records = dataset.records[shard.start : shard.stop]
    module = build_module(cfg, device, checkpoint=cfg.VAL.checkpoint)

    def draw(item, prediction):
        save_picture(result_panel(item, prediction, dataset.table), results / f"{names[item['info']]}.png")

    return evaluate(
        module,
        dataset,
        device=device,
        batch_size=cfg.VAL.batch_size,
        workers=workers,
        progress=shard is None or shard.start == 0,
        on_result=draw if cfg.VAL.visualize else None,
    )


def shards(count: int, parts: int) -> list[range]:
    """`count` positions as contiguous ranges whose lengths differ by one at most; empty ones are left out."""
    bounds = [count * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds) if b > a]


def _score_shard(path: str | None, opts: Sequence[str], device: str, shard: range, processes: int) -> Evaluation:
    """Work of one process."""
    setup_logger(distributed_rank=0 if shard.start == 0 else 1, filename=None)  # one reports, the others warn only
    torch.set_num_threads(max(1, available_cores() // processes))
    return score(load_config(path, opts), torch.device(device), shard=shard, workers=1)


def score_on_devices(path: str | None, opts: Iterable[str], devices: Sequence[torch.device]) -> Evaluation:
    """Evaluate with one process per device; every picture is scored exactly once and the counts are added up.

    Args:
        path, opts: as for `load_config`.
        devices: one per process; the CPU may come more than once.

    Raises:
        UserError: a process failed or was killed; names its share of the list.
    """
    cfg, opts = load_config(path, opts), list(opts)
    data = cfg.DATASET
    parts = shards(len(ValDataset(data.root_dataset, data.list_val, data)), len(devices))
    whole: Evaluation | None = None
    with ProcessPoolExecutor(len(parts), mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(_score_shard, path, opts, str(device), part, len(parts)): (device, part)
            for device, part in zip(devices, parts, strict=False)
        }
        for future in as_completed(futures):
            device, part = futures[future]
            try:
                share = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(
                    f"a process of the evaluation was killed (out of memory?) before images {part.start + 1} to "
                    f"{part.stop} on {device} were done; no figures were written"
                ) from None
            whole = share if whole is None else whole.merge(share)
    return whole


def report(cfg: Config, config_path: str | None, evaluation: Evaluation) -> None:
    """Print the figures and write them to results.json."""
    print(evaluation.report())
    results = result_folder(cfg)
    with whole_file(results / "results.json") as partial:
        content = {"config": config_path, "checkpoint": cfg.VAL.checkpoint, **evaluation.as_dict()}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"Written to {results}: results.json" + (" and a panel per image" if cfg.VAL.visualize else ""))
