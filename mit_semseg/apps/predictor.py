"""Segmenting picture files: reading, network, and what is written for each."""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..config import load_config
from ..dataset import ClassTable, TestDataset
from ..dataset.datasets import table_of
from ..dataset.files import ImageFileError
from ..dataset.layouts import find_images
from ..dataset.loading import explained
from ..dataset.samplers import shards
from ..evaluation.evaluator import read_items
from ..evaluation.inference import WHOLE, View, label_maps
from ..lib.utils import UserError, whole_file
from .background import Background
from .building import build_module, view_of
from .visualize import (
    class_shares,
    colorEncode,
    is_result,
    overlay,
    panel,
    result_names,
    save_picture,
)

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.001  # classes below are not printed


@dataclass(frozen=True)
class Result:
    """A segmented picture.

    Attributes:
        path: of the picture.
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) int64 class indices.
        table: class names and colours.
    """

    path: str
    image: np.ndarray
    label_map: np.ndarray
    table: ClassTable

    @property
    def classes(self) -> list[dict]:
        """Classes with name, index, share of the pixels and colour, largest first."""
        return class_shares(self.label_map, self.table)

    def save(self, stem: Path, endings: Sequence[str] = (".png",)) -> None:
        """Write `<stem><ending>` for every ending.

        Args:
            stem: path without extension.
            endings: of `.png` (the panel [image | prediction]), `_overlay.png` (the tinted picture with a legend),
                `_index.png` (class indices as grey values, 8 bits, 16 above 256 classes), `_label.png` (the same with
                the label values of the data set, as evaluation servers read them) and `.json` (the classes with their
                shares).
        """
        for ending in endings:
            if ending == ".json":
                self._save_shares(_named(stem, ending))
            else:
                save_picture(self._picture(ending), _named(stem, ending))

    def _picture(self, ending: str) -> Image.Image:
        if ending == "_overlay.png":
            return overlay(self.image, self.label_map, self.table)
        if ending == "_index.png":
            return Image.fromarray(self.label_map.astype(np.uint8 if len(self.table) <= 256 else np.uint16))
        if ending == "_label.png":
            return Image.fromarray(self.table.decode(self.label_map))
        return panel([self.image, colorEncode(self.label_map, self.table.colors)])

    def _save_shares(self, path: Path) -> None:
        height, width = self.label_map.shape
        content = {"image": self.path, "width": width, "height": height, "classes": self.classes}
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _named(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


class _Pictures(TestDataset):
    """Test pictures; one that cannot be read becomes {info, error} instead of ending the run."""

    def __getitem__(self, index: int) -> dict:
        try:
            return super().__getitem__(index)
        except ImageFileError as error:
            return {"info": self.records[index]["fpath_img"], "error": str(error)}


def segment(
    module: nn.Module,
    paths: Sequence[str],
    opt,
    table: ClassTable,
    *,
    device: torch.device,
    view: View = WHOLE,
    **reading,
) -> Iterator[Result | tuple[str, str]]:
    """Segment pictures one after the other; reading goes on in the background.

    Args:
        module: a `SegmentationModule`, of which a copy is made for inference (see `evaluation.network`).
        paths: of the pictures.
        opt: object with imgSizes, imgMaxSize, padding_constant.
        table: class names and colours.
        device: where the module is.
        view: mirrored, windows, precision.
        reading: options of `read_items`.

    Yields:
        A `Result` for every picture, or (path, reason) for one that cannot be read.
    """
    network, batch = view.network(module, device), reading.get("batch_size", 1)
    items = read_items(_Pictures([{"fpath_img": path} for path in paths], opt), device=device, **reading)
    while group := list(islice(items, batch)):
        good = [item for item in group if "error" not in item]
        maps = label_maps(network, good, device, view)
        for item in group:
            if "error" in item:
                yield item["info"], item["error"]
            else:
                yield Result(item["info"], item["img_ori"], next(maps), table)


def segment_share(
    device: torch.device,
    number: int,
    parts: int,
    send: Callable[[str], None],
    path: str | None,
    opts: Sequence[str],
    plan: dict[str, Path],
    endings: Sequence[str],
) -> list[str]:
    """Segment share `number` of the pictures of a plan with TEST.checkpoint, and write the results.

    Args:
        send: called with what there is to say of every picture.
        path, opts: as for `load_config`.
        plan, endings: of `find_pictures`.

    Returns:
        For every picture that cannot be read, the reason.
    """
    cfg, failed = load_config(path, opts), []
    share = shards(len(plan), parts)[number]
    pictures, table = list(plan)[share.start : share.stop], table_of(cfg.DATASET)
    module = build_module(cfg, device, checkpoint=cfg.TEST.checkpoint)
    reading = {"workers": cfg.TRAIN.workers, "timeout": cfg.TRAIN.timeout, "processes": parts}
    reading["batch_size"] = cfg.TEST.batch_size

    def write(result: Result) -> None:
        stem = plan[result.path]
        result.save(stem, endings)
        shares = [
            f"\n  {table.labels[entry['index']]}: {entry['share'] * 100:.2f} %"
            for entry in result.classes
            if entry["share"] > SMALLEST_SHARE
        ]
        send(f"{result.path} -> {_named(stem, endings[0])}{''.join(shares)}")

    with explained(), Background() as later:
        for result in segment(module, pictures, cfg.DATASET, table, device=device, view=view_of(cfg), **reading):
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


def find_pictures(given: str, result: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Pictures that `--imgs` names, and for each the path without extension of its results.

    Args:
        given: a file, a folder (searched recursively, any type Pillow reads), or a glob. Results of earlier runs in a
            folder or glob are left out.
        result: folder of the results.
        endings: what will be written for every picture, e.g. `(".png", ".json")`.

    Returns:
        {picture: stem}; folders below the given one are kept, and no two results have the same name.

    Raises:
        UserError: nothing there, or something would be written over that is no result.
    """
    path = Path(given)
    if path.is_file():
        base, found = path.parent, [path]
    elif path.is_dir() or has_magic(given):
        base = path if path.is_dir() else Path(*_fixed_parts(path))
        matches = find_images(path) if path.is_dir() else sorted(Path(p) for p in glob(given, recursive=True))
        found = [p for p in matches if p.is_file() and not is_result(p)]
        left_out = sum(p.is_file() for p in matches) - len(found)
        if left_out:
            logger.info("%d results of earlier runs left out", left_out)
    else:
        raise UserError(f"--imgs {given}: there is no such file or folder")
    if not found:
        raise UserError(f"--imgs {given}: no pictures there")
    names = result_names([str(p.relative_to(base)) for p in found])
    plan = {str(p): result / names[str(p.relative_to(base))] for p in found}
    _refuse_overwriting(plan, endings)
    return plan


def _fixed_parts(pattern: Path) -> tuple[str, ...]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return parts[:first]


def _refuse_overwriting(plan: dict[str, Path], endings: Sequence[str]) -> None:
    for picture, stem in plan.items():
        for path in (_named(stem, ending) for ending in endings):
            if path.exists() and not (_is_shares(path) if path.suffix == ".json" else is_result(path)):
                raise UserError(
                    f"the result of {picture} would be written over {path}, which is no result of an earlier run: "
                    f"choose another folder in TEST.result"
                )


def _is_shares(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"image", "classes"} <= set(content)
