"""Load records from image lists and folders, and write records to odgt files."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..lib.utils import UTF8, atomic_write, progress_bar, shorten_list
from .image_io import ImageFileError, image_size
from .layouts import VOC_LISTS, ListError, Record, read_lines, read_voc_split, scan_folders


def load_records(
    source: str | os.PathLike | Iterable[Mapping], root: str | os.PathLike = "", problems: list[str] | None = None
) -> list[Record]:
    """Load records from a list file, a folder or an iterable.

    Args:
        source: one of
            - an odgt file; a line is a JSON object, or two paths (image and label);
            - a PASCAL VOC split list (`ImageSets/.../NAME.txt`);
            - a folder that contains `images/` and `annotations/` (for Cityscapes, `leftImg8bit/` and `gtFine/`);
            - one of these image folders, or a subfolder of it that the annotation folder also has;
            - an iterable of records.
        root: base folder for the paths in records.
        problems: list that receives a message for every invalid line and every missing or unpaired file. If None,
            ListError is raised instead. A source without valid records always raises ListError.
    """
    if not isinstance(source, (str, os.PathLike)):
        records = [dict(record) for record in source]
        for i, record in enumerate(records):
            _check_record(record, f"record {i}")
        return records
    records, found = _read_source(Path(source), root)
    if found and (problems is None or not records):
        raise ListError(f"list {source} has {len(found)} invalid lines or files: {shorten_list(found, 3)}")
    if not records:
        raise ListError(f"list {source} is empty; it must contain at least one image")
    if problems is not None:
        problems += found
    return records


def _read_source(path: Path, root: str | os.PathLike) -> tuple[list[Record], list[str]]:
    in_root = Path(root, path)
    # Search folders and split lists in `root` first, but odgt files in the working directory first.
    for candidate in (in_root, path):
        if candidate.is_dir():
            return scan_folders(candidate, root)
        if candidate.is_file() and VOC_LISTS in candidate.absolute().parts:
            return read_voc_split(candidate, root)
    for candidate in (path, in_root):
        if candidate.is_file():
            return _read_odgt(candidate)
    folder = Path(root).absolute()
    if not folder.is_dir():
        raise ListError(f"DATASET.root_dataset: folder {folder} not found; it should contain {path}")
    raise ListError(
        f"list or folder {path} not found in {folder} or {Path.cwd()}; set DATASET.list_train and DATASET.list_val as "
        f"described in docs/own-data.md; for ADE20K run ./download_ade20k.sh"
    )


def _check_record(record: Mapping, where: str) -> None:
    if not record.get("fpath_img"):
        raise ListError(f"{where}: fpath_img (path of the image) is missing")
    for key in ("fpath_img", "fpath_segm"):
        if not isinstance(record.get(key, ""), str) or "\0" in record.get(key, ""):
            raise ListError(f"{where}: {key} {record[key]!r} is not a path")
    for key in ("width", "height"):
        if not isinstance(record.get(key, 1), (int, float)) or not 0 <= record.get(key, 1) < math.inf:
            raise ListError(f"{where}: {key} {record[key]!r} is not a number of pixels; correct or remove it")


def _parse_line(line: str, where: str) -> Record:
    words = line.split()
    if len(words) == 2 and not line.lstrip().startswith(("{", "[")):
        return dict(zip(("fpath_img", "fpath_segm"), words, strict=True))
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        expected = "a JSON object or the paths of an image and its label"
        hint = f"PASCAL VOC lists must be in a folder named {VOC_LISTS}"
        raise ListError(f"{where}: expected {expected} (JSON error: {reason}); {hint}") from None
    if not isinstance(record, dict):
        raise ListError(f"{where}: expected a JSON object, got {type(record).__name__}")
    _check_record(record, where)
    return record


def _read_odgt(path: Path) -> tuple[list[Record], list[str]]:
    records, problems = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                records.append(_parse_line(line, f"{path}, line {number}"))
            except ListError as error:
                problems.append(str(error))
    return records, problems


def add_sizes(records: Iterable[Mapping], root: str | os.PathLike = "") -> list[Record]:
    """Return copies of records with `width` and `height` from the image headers (not added for unreadable images)."""
    records = [dict(record) for record in records]
    for record in progress_bar(records, desc="reading image sizes", unit="img", leave=False):
        with suppress(ImageFileError):  # reported when the image is decoded
            record["width"], record["height"] = image_size(Path(root, record["fpath_img"]))
    return records


def write_odgt(records: Iterable[Mapping], path: str | os.PathLike) -> None:
    """Write records to an odgt file atomically, one JSON object per line."""
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), **UTF8)
