"""Segment images or a video; used by test.py."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..build import load_options
from ..config import Config
from ..dataset.classes import class_table_from_options
from ..dataset.image_io import ImageFileError
from ..dataset.loader import worker_errors
from ..dataset.samplers import shards
from ..engine import World
from ..lib.utils import UserError, progress_bar
from ..predict.images import find_inputs
from ..predict.raster import is_raster
from ..predict.results import SUFFIXES, Result, check_ignored_value, raster_suffixes
from ..predict.segmenter import Segmenter
from ..predict.video import is_video, output_path, segment_video
from .common import refuse_torchrun
from .devices import describe_all
from .workers import Shard, background_writer, run_sharded

logger = logging.getLogger(__name__)

MIN_FRACTION = 0.001  # classes below this fraction of all pixels are not printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for output files and for videos."""
    for name, text in {
        "overlay": "also write the image blended with the class colors, next to a legend",
        "index": "also write the class index of every pixel as a grayscale PNG",
        "labels": "also write a grayscale PNG with the label values that the dataset uses, e.g. Cityscapes labelIds",
        "confidence": "also write the largest class probability of every pixel as a grayscale PNG (255: 100 %%) and "
        "in colors",
        "json": "also write a JSON file with the classes in the image and the fraction of pixels of each class",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    text = "with --labels: write the ignored label value where the largest class probability is below P (0 to 1)"
    parser.add_argument("--min-confidence", type=float, metavar="P", default=0, help=text)
    text = "do not write the panel [image | prediction]"
    parser.add_argument("--no-panel", dest="panel", action="store_false", help=text)
    text = "for videos: weight of previous frames in the averaged logits, from 0 (off, default) to below 1"
    parser.add_argument("--smoothing", type=float, metavar="WEIGHT", default=0, help=text)


def suffixes_of(args: argparse.Namespace) -> list[str]:
    """Check the options for images and videos, and return the suffixes of output files (see `Result.save_as`)."""
    suffixes = [suffix for suffix, name in SUFFIXES.items() if getattr(args, name)]
    if is_video(args.imgs):
        if suffixes != [".png"]:
            raise UserError(
                f"{args.imgs} is a video; omit --overlay, --index, --labels, --confidence, --json and --no-panel"
            )
        if not 0 <= args.smoothing < 1:
            raise UserError(f"--smoothing {args.smoothing:g} is out of range; use a value from 0 to below 1")
    elif args.smoothing:
        raise UserError(f"{args.imgs} is not a video; omit --smoothing {args.smoothing:g}, which is for videos only")
    if not suffixes:
        raise UserError(
            "--no-panel disables the only output file; add --overlay, --index, --labels, --confidence or --json"
        )
    if args.min_confidence and not args.labels:
        raise UserError(f"--min-confidence {args.min_confidence:g} needs --labels")
    if not 0 <= args.min_confidence <= 1:
        raise UserError(f"--min-confidence {args.min_confidence:g} is out of range; use a value from 0 to 1")
    return suffixes


def run(cfg: Config, world: World, inputs: str, suffixes: Sequence[str], min_confidence: float = 0) -> int:
    """Segment images with TEST.checkpoint, write the output files to TEST.result, and return the exit code.

    `inputs` is an image, a folder or a glob pattern; `suffixes` and `min_confidence` are arguments of `Result.save_as`.
    """
    if min_confidence:
        check_ignored_value(class_table_from_options(cfg.DATASET))
    logger.info("devices: %s", describe_all(world))
    found = find_inputs(inputs, Path(cfg.TEST.result), suffixes) if world.is_main else None
    stems = world.gather(found, "looking for images")[0]  # all ranks use the list found by rank 0
    with progress_bar(total=len(stems), desc="segmenting", unit="img", shown=world.is_main) as bar:

        def on_report(text: str) -> None:
            bar.update()
            if logger.isEnabledFor(logging.INFO):
                bar.write(text)

        reasons = run_sharded(segment_shard, world, len(stems), (cfg, stems, suffixes, min_confidence), on_report)
    skipped = [reason for shard in reasons for reason in shard]
    if world.is_main:
        print(f"{len(stems) - len(skipped)} of {len(stems)} images segmented, results in {cfg.TEST.result}")
        for reason in skipped:
            print(f"skipped: {reason}")
    return 1 if skipped else 0


def segment_shard(
    shard: Shard,
    report: Callable[[str], None],
    cfg: Config,
    stems: dict[str, Path],
    suffixes: Sequence[str],
    min_confidence: float,
) -> list[str]:
    """Segment a shard of the images, write the output files, and return a message for every unreadable image.

    `stems` maps image paths to output paths without suffix.
    """
    own = shards(len(stems), shard.count)[shard.index]
    segmenter = Segmenter.from_cfg(cfg, cfg.TEST.checkpoint, shard.device)
    skipped = []

    def write(result: Result) -> None:
        path = result.save_as(stems[result.path], suffixes, min_confidence=min_confidence)[0]
        classes = [
            f"\n  {result.table.labels[entry['index']]}: {entry['fraction'] * 100:.2f} %"
            for entry in result.classes
            if entry["fraction"] > MIN_FRACTION
        ]
        report(f"{result.path} -> {path}{''.join(classes)}")

    confidence = bool(min_confidence) or any(SUFFIXES[suffix] == "confidence" for suffix in suffixes)
    loading = load_options(cfg, cfg.TEST.batch_size, shard.local_size)
    with worker_errors(), background_writer() as submit:
        paths = list(stems)[own.start : own.stop]
        rasters = dict.fromkeys(path for path in paths if is_raster(path))
        for path in rasters:
            try:
                files = segmenter.segment_raster(
                    path, stems[path], raster_suffixes(suffixes), min_confidence=min_confidence
                )
                report(f"{path} -> {', '.join(map(str, files))}")
            except ImageFileError as error:
                skipped.append(str(error))
                report(f"{path}: skipped")
        images = [path for path in paths if path not in rasters]
        for result in segmenter.segment_files(images, loading, confidence=confidence) if images else ():
            if isinstance(result, Result):
                submit(write, result)
            else:
                path, reason = result
                skipped.append(reason)
                report(f"{path}: skipped")
    return skipped


def run_video(cfg: Config, source: str, device: torch.device, smoothing: float) -> int:
    """Segment a video file or camera with TEST.checkpoint, write a video to TEST.result, and return the exit code.

    After Ctrl-C or SIGTERM, the frames segmented so far are saved; then `KeyboardInterrupt` is raised.
    """
    refuse_torchrun(f"{source}: a video cannot be segmented with torchrun; start test.py with python instead")
    logger.info("device: %s", device)
    segmenter = Segmenter.from_cfg(cfg, cfg.TEST.checkpoint, device)
    path = output_path(source, Path(cfg.TEST.result))
    count, interruption = segment_video(segmenter, source, path, smoothing=smoothing)
    print(f"{path}: {count} frames{', interrupted' if interruption else ''}")
    if interruption:
        raise interruption
    return 0
