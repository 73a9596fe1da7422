"""Segment images or a video, for test.py."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..build import load_options
from ..config import Config
from ..dataset.loader import worker_errors
from ..dataset.samplers import shards
from ..engine import World
from ..lib.utils import UserError, progress_bar
from ..predict.images import find_inputs
from ..predict.results import Result
from ..predict.segmenter import Segmenter
from ..predict.video import is_video, output_path, segment_video
from .common import refuse_torchrun
from .devices import describe_all
from .workers import BackgroundWriter, Shard, run_sharded

logger = logging.getLogger(__name__)

MIN_FRACTION = 0.001  # classes with a smaller fraction of the pixels are not printed
SUFFIXES = {
    "no_panel": ".png",
    "overlay": "_overlay.png",
    "index": "_index.png",
    "labels": "_label.png",
    "json": ".json",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the files to write and for videos."""
    for name, text in {
        "overlay": "also write the image blended with the class colors, with a legend",
        "index": "also write class indices as a grayscale PNG",
        "labels": "also write the label values of the dataset as a grayscale PNG, e.g. Cityscapes labelIds",
        "json": "also write the classes and their fractions of the pixels as JSON",
        "no-panel": "do not write the panel [image | prediction]",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(
        "--smoothing", type=float, default=0, help="of videos: weight of the previous frames, 0 to below 1 (default 0)"
    )


def suffixes_of(args: argparse.Namespace) -> list[str]:
    """Return the suffixes of the files to write, see `Result.save_as`.

    Raises:
        UserError: there are none, or the options do not apply to a video.
    """
    given = [name for name in SUFFIXES if getattr(args, name)]
    if is_video(args.imgs):
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{options}: not for videos; the result of {args.imgs} is a video with class colors")
        return []
    if args.smoothing:
        raise UserError(f"--smoothing {args.smoothing:g}: only for videos, {args.imgs} is not one")
    suffixes = [suffix for name, suffix in SUFFIXES.items() if getattr(args, name) != (name == "no_panel")]
    if not suffixes:
        raise UserError("--no-panel leaves no file to write; add --overlay, --index, --labels or --json")
    return suffixes


def run(cfg: Config, world: World, inputs: str, suffixes: Sequence[str]) -> int:
    """Segment images with TEST.checkpoint and write the results to TEST.result.

    Args:
        inputs: image, folder or glob.
        suffixes: of the files to write.

    Returns:
        Exit code: 1 if images were skipped, else 0.
    """
    logger.info("devices: %s", describe_all(world))
    found = find_inputs(inputs, Path(cfg.TEST.result), suffixes) if world.is_main else None
    stems = world.gather(found, "looking for images")[0]  # one list for all ranks
    with progress_bar(total=len(stems), desc="segmenting", unit="img", shown=world.is_main) as bar:
        verbose = logger.isEnabledFor(logging.INFO)

        def on_report(text: str) -> None:
            bar.update()
            if verbose:
                bar.write(text)

        reasons = run_sharded(segment_shard, world, len(stems), (cfg, stems, suffixes), on_report)
    skipped = [reason for shard in reasons for reason in shard]
    if world.is_main:
        print(f"{len(stems) - len(skipped)} of {len(stems)} images segmented, results in {cfg.TEST.result}")
        for reason in skipped:
            print(f"skipped: {reason}")
    return 1 if skipped else 0


def segment_shard(
    shard: Shard, report: Callable[[str], None], cfg: Config, stems: dict[str, Path], suffixes: Sequence[str]
) -> list[str]:
    """Segment a shard of the images and write the results.

    Args:
        stems: path of the results, without suffix, of every image.

    Returns:
        The reason for every image that cannot be read.
    """
    own = shards(len(stems), shard.count)[shard.index]
    segmenter = Segmenter.from_cfg(cfg, cfg.TEST.checkpoint, shard.device)
    skipped = []

    def write(result: Result) -> None:
        path = result.save_as(stems[result.path], suffixes)[0]
        classes = [
            f"\n  {result.table.labels[entry['index']]}: {entry['fraction'] * 100:.2f} %"
            for entry in result.classes
            if entry["fraction"] > MIN_FRACTION
        ]
        report(f"{result.path} -> {path}{''.join(classes)}")

    loading = load_options(cfg, cfg.TEST.batch_size, shard.local_size)
    with worker_errors(), BackgroundWriter() as writer:
        for result in segmenter.segment_files(list(stems)[own.start : own.stop], loading):
            if isinstance(result, Result):
                writer.submit(write, result)
            else:
                path, reason = result
                skipped.append(reason)
                report(f"{path}: skipped")
    return skipped


def run_video(cfg: Config, given: str, device: torch.device, smoothing: float) -> int:
    """Segment a video or camera with TEST.checkpoint and write a video to TEST.result.

    Raises:
        KeyboardInterrupt: the run was interrupted; the video has the frames up to then.
        UserError: the video, the weights or an option cannot be used.
    """
    refuse_torchrun(f"a video is segmented by one process; run python test.py --imgs {given} without torchrun")
    if not 0 <= smoothing < 1:
        raise UserError(f"--smoothing {smoothing:g}: must be at least 0 and below 1")
    if smoothing and any(np.atleast_1d(cfg.INFERENCE.window_size)):
        raise UserError("--smoothing does not work with a sliding window; set INFERENCE.window_size 0")
    logger.info("device: %s", device)
    segmenter = Segmenter.from_cfg(cfg, cfg.TEST.checkpoint, device)
    path = output_path(given, Path(cfg.TEST.result))
    count, interruption = segment_video(segmenter, given, path, smoothing=smoothing)
    print(f"{path}: {count} frames{', interrupted' if interruption else ''}")
    if interruption:
        raise interruption
    return 0
