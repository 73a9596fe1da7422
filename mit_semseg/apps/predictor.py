"""Segmenting picture files: reading, network, and what is written for each."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..dataset import ClassTable, TestDataset
from ..dataset.files import ImageFileError
from ..dataset.records import find_images
from ..evaluation import label_map
from ..evaluation.evaluator import item_loader
from ..lib.utils import UserError, whole_file
from .visualize import class_shares, colorEncode, overlay, panel, save_picture

logger = logging.getLogger(__name__)


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

    def save(self, stem: Path, *, with_overlay: bool = False, with_index: bool = False, with_json: bool = False):
        """Write the panel [image | prediction] to `<stem>.png`, and what else is asked for beside it.

        Args:
            stem: path without extension.
            with_overlay: `<stem>_overlay.png`, the tinted picture with a legend.
            with_index: `<stem>_index.png`, class indices as grey values (8 bits, 16 above 256 classes).
            with_json: `<stem>.json`, the classes with their shares.
        """
        colored = colorEncode(self.label_map, self.table.colors)
        save_picture(panel([self.image, colored]), _named(stem, ".png"))
        if with_overlay:
            save_picture(overlay(self.image, self.label_map, self.table), _named(stem, "_overlay.png"))
        if with_index:
            kind = np.uint8 if len(self.table) <= 256 else np.uint16
            save_picture(Image.fromarray(self.label_map.astype(kind)), _named(stem, "_index.png"))
        if with_json:
            height, width = self.label_map.shape
            content = {"image": self.path, "width": width, "height": height, "classes": self.classes}
            with whole_file(_named(stem, ".json")) as partial:
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
    batch_size: int = 1,
) -> Iterator[Result | tuple[str, str]]:
    """Segment pictures one after the other; reading goes on in the background.

    Args:
        module: a `SegmentationModule`; put in eval mode.
        paths: of the pictures.
        opt: object with imgSizes, imgMaxSize, padding_constant.
        table: class names and colours.
        device: where the module is.
        batch_size: pictures loaded per step.

    Yields:
        A `Result` for every picture, or (path, reason) for one that cannot be read.
    """
    module.eval()
    for items in item_loader(_Pictures([{"fpath_img": path} for path in paths], opt), batch_size):
        for item in items:
            if "error" in item:
                yield item["info"], item["error"]
            else:
                yield Result(item["info"], item["img_ori"], label_map(module, item, device), table)


def find_pictures(given: str, result: Path) -> dict[str, Path]:
    """Pictures that `--imgs` names, and for each the path without extension of its results.

    Args:
        given: a file, a folder (searched recursively, any type Pillow reads), or a glob.
        result: folder of the results; inside the searched folder it is left out of the search.

    Returns:
        {picture: stem}; folders below the given one are kept, and equal stems keep their extensions apart.

    Raises:
        UserError: nothing there, or a result would be written over a picture.
    """
    path = Path(given)
    if path.is_dir():
        base, found = path, find_images(path)
        inside = result.resolve() != path.resolve() and result.resolve().is_relative_to(path.resolve())
        found = [p for p in found if not (inside and p.resolve().is_relative_to(result.resolve()))]
    elif path.is_file():
        base, found = path.parent, [path]
    elif has_magic(given):
        found = sorted(Path(p) for p in glob(given, recursive=True) if Path(p).is_file())
        base = Path(*_fixed_parts(Path(given)))
    else:
        raise UserError(f"--imgs {given}: there is no such file or folder")
    if not found:
        raise UserError(f"--imgs {given}: no pictures there")
    stems = Counter(p.relative_to(base).with_suffix("") for p in found)
    plan = {}
    for picture in found:
        relative = picture.relative_to(base)
        stem = relative if stems[relative.with_suffix("")] > 1 else relative.with_suffix("")
        plan[str(picture)] = result / stem
    _refuse_overwriting(plan)
    return plan


def _fixed_parts(pattern: Path) -> tuple[str, ...]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return parts[:first]


def _refuse_overwriting(plan: dict[str, Path]) -> None:
    inputs = {Path(picture).resolve() for picture in plan}
    for picture, stem in plan.items():
        for ending in (".png", "_overlay.png", "_index.png", ".json"):
            if _named(stem, ending).resolve() in inputs:
                raise UserError(
                    f"the result of {picture} would be written over the picture {_named(stem, ending)}: choose another "
                    f"folder in TEST.result"
                )
