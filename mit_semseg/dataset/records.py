"""Lists of images: load records from any source, write odgt files."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..lib.utils import UTF8, atomic_write, progress_bar
from .image_io import ImageFileError, image_size
from .layouts import VOC_LISTS, ListError, Record, read_lines, read_voc_split, scan_folders


def load_records(
    source: str | os.PathLike | Iterable[Mapping], root: str | os.PathLike = "", problems: list[str] | None = None
) -> list[Record]:
    """Load the records of a list, a folder or an iterable.

    Args:
        source: one of
            - an odgt file: per line one JSON object, or the paths of an image and its label;
            - a PASCAL VOC split list (`ImageSets/.../NAME.txt`);
            - a folder with `images/` and `annotations/`, or an image folder whose path has a part `images` that can be
              replaced by `annotations`; the same with `leftImg8bit` and `gtFine` (Cityscapes);
            - records.
        root: folder that the paths in records are relative to.
        problems: gets a sentence for every file without a partner and every invalid line. None raises ListError.
    """
    if not isinstance(source, (str, os.PathLike)):
        records = [dict(record) for record in source]
        for i, record in enumerate(records):
            _check_record(record, f"record {i}")
        return records
    path = Path(source)
    # Folders and split lists are searched in `root` first, odgt files in the working directory first.
    for candidate in (Path(root) / path, path):
        if candidate.is_dir():
            return scan_folders(candidate, root, problems)
        if candidate.is_file() and VOC_LISTS in candidate.absolute().parts:
            return read_voc_split(candidate, root, problems)
    for candidate in (path, Path(root) / path):
        if candidate.is_file():
            return _read_odgt(candidate, problems)
    if root and not Path(root).is_dir():
        raise ListError(f"DATASET.root_dataset: folder {Path(root).absolute()} not found; it should contain {path}")
    raise ListError(
        f"list or folder {path} not found in {Path(root).absolute()} and {Path.cwd()}; set DATASET.list_train and "
        f"DATASET.list_val as described in docs/own-data.md; for ADE20K run ./download_ade20k.sh"
    )


def _check_record(record: Mapping, where: str) -> None:
    if not record.get("fpath_img"):
        raise ListError(f"{where}: fpath_img is missing")
    for key in ("fpath_img", "fpath_segm"):
        if not isinstance(record.get(key, ""), str) or "\0" in record.get(key, ""):
            raise ListError(f"{where}: {key} {record[key]!r} is not a path")
    for key in ("width", "height"):
        if not isinstance(record.get(key, 1), (int, float)) or not 0 <= record.get(key, 1) < math.inf:
            raise ListError(f"{where}: {key} {record[key]!r} is not a number of pixels")


def _parse_line(line: str, where: str) -> Record:
    words = line.split()
    if len(words) == 2 and not line.lstrip().startswith(("{", "[")):
        return dict(zip(("fpath_img", "fpath_segm"), words, strict=True))
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        expected = f"the paths of an image and its label (PASCAL VOC lists must be in a folder {VOC_LISTS})"
        raise ListError(f"{where}: expected one JSON object per line ({reason}), or {expected}") from None
    if not isinstance(record, dict):
        raise ListError(f"{where}: expected one JSON object per line, got {type(record).__name__}")
    _check_record(record, where)
    return record


def _read_odgt(path: Path, problems: list[str] | None) -> list[Record]:
    records, found = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse_line(line, f"{path}, line {number}"))
        except ListError as error:
            if problems is None:
                raise
            found.append(str(error))
    if not records:
        raise ListError(f"list {path} has no valid line; {found[0]}" if found else f"list {path} is empty")
    if problems is not None:
        problems += found
    return records


def add_sizes(records: Iterable[Mapping], root: str | os.PathLike = "") -> list[Record]:
    """Return copies of the records with `width` and `height` from the image headers; unreadable images get none."""
    result = [dict(record) for record in records]
    for record in progress_bar(result, desc="reading image sizes", unit="img", leave=False):
        with suppress(ImageFileError):  # reported when the image is decoded
            record["width"], record["height"] = image_size(Path(root, record["fpath_img"]))
    return result


def write_odgt(records: Iterable[Mapping], path: str | os.PathLike) -> None:
    """Write records to an odgt file atomically, one JSON object per line."""
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), **UTF8)
