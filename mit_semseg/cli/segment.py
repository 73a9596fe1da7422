"""Segment images or a video: what test.py runs."""

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..config import Config, load_config
from ..dataset.loader import worker_errors
from ..dataset.samplers import shards
from ..lib.utils import UserError
from ..predict.results import Result, named
from ..predict.segmenter import Segmenter
from ..predict.video import VideoError, _is_camera, is_video, output_path, segment_video
from .background import Background
from .common import refuse_torchrun
from .devices import describe
from .workers import Share

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.001  # classes below are not printed


def segment_share(
    share: Share,
    send: Callable[[str], None],
    path: str | None,
    opts: Sequence[str],
    plan: dict[str, Path],
    endings: Sequence[str],
) -> list[str]:
    """Segment a share of the pictures of a plan with TEST.checkpoint, and write the results.

    Args:
        send: called with what there is to say of every picture.
        path, opts: as for `load_config`.
        plan, endings: of `find_inputs`.

    Returns:
        For every picture that cannot be read, the reason.
    """
    cfg, failed = load_config(path, opts), []
    part = shards(len(plan), share.parts)[share.number]
    pictures = list(plan)[part.start : part.stop]
    segmenter = Segmenter.from_cfg(cfg, cfg.TEST.checkpoint, share.device)
    reading = {"workers": cfg.TRAIN.workers, "timeout": cfg.RUNTIME.timeout, "processes": share.local}
    reading["batch_size"] = cfg.TEST.batch_size

    def write(result: Result) -> None:
        stem = plan[result.path]
        result.save_as(stem, endings)
        shares = [
            f"\n  {result.table.labels[entry['index']]}: {entry['share'] * 100:.2f} %"
            for entry in result.classes
            if entry["share"] > SMALLEST_SHARE
        ]
        send(f"{result.path} -> {named(stem, endings[0])}{''.join(shares)}")

    with worker_errors(), Background() as later:
        for result in segmenter.segment_files(pictures, **reading):
            if isinstance(result, Result):
                later(partial(write, result))
            else:
                failed.append(result[1])
                send(f"{result[0]}: not segmented")
    return failed


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options that say what is written for a picture, to be handed to `endings_of`."""
    for name, text in {
        "overlay": "also write the tinted picture with a legend",
        "index": "also write the class indices as a grey PNG",
        "labels": "also write the data set's own label values as a grey PNG, e.g. Cityscapes' labelIds",
        "json": "also write the classes and their shares as JSON",
        "no-panel": "do not write the panel [image | prediction]",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def endings_of(args: argparse.Namespace) -> list[str]:
    """Endings of the results, see `Result.save`.

    Raises:
        UserError: nothing is to be written.
    """
    wanted = {".png": not args.no_panel, "_overlay.png": args.overlay, "_index.png": args.index}
    wanted |= {"_label.png": args.labels, ".json": args.json}
    endings = [ending for ending, yes in wanted.items() if yes]
    if not endings:
        raise UserError("--no-panel leaves nothing to write: add --overlay, --index, --labels or --json")
    return endings


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what the command line asks for that the kind of `args.imgs` does not have.

    Raises:
        UserError: names it.
    """
    if not is_video(args.imgs):
        if args.smoothing:
            raise UserError(f"--smoothing {args.smoothing:g} is for videos, and {args.imgs} is none")
        return
    refuse_torchrun(f"a video is segmented by one process: python test.py --imgs {args.imgs} ...")
    of_pictures = ("overlay", "index", "labels", "json", "no-panel")
    given = [f"--{name}" for name in of_pictures if vars(args)[name.replace("-", "_")]]
    if given:
        raise UserError(f"{', '.join(given)}: for pictures; a video becomes a tinted video")


def run(cfg: Config, given: str, device: torch.device, smoothing: float) -> None:
    """Segment the video that `--imgs` names with TEST.checkpoint, into TEST.result.

    Raises:
        KeyboardInterrupt: there was one; the video has the frames until then.
        UserError: the video, the weights or an option cannot be used.
    """
    if not 0 <= smoothing < 1:
        raise VideoError(f"--smoothing {smoothing:g}: give a share of 0 (none) to below 1")
    if smoothing and any(np.atleast_1d(cfg.INFERENCE.window_size)):
        raise VideoError("--smoothing needs the whole picture: set INFERENCE.window_size 0")
    if not _is_camera(given) and not Path(given).is_file():
        raise VideoError(f"--imgs {given}: there is no such file")
    logger.info("device: %s", describe(device))
    path = output_path(given, Path(cfg.TEST.result))
    written = segment_video(Segmenter.from_cfg(cfg, cfg.TEST.checkpoint, device), given, path, smoothing=smoothing)
    print(f"{written.path}: {written.frames} frames{', interrupted' if written.interruption else ''}")
    if written.interruption:
        raise written.interruption
