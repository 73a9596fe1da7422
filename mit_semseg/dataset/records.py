"""Load records from image lists and folders, and write records to odgt files."""

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
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


def split_records(
    records: Sequence[Record], fraction: float, *, seed: int = 0, groups: bool = False
) -> tuple[list[Record], list[Record]]:
    """Split records into a training set and a validation set, both in the order of `records`.

    The choice depends only on the names of the images and the seed: when images are added, most of the others stay in
    their set. Of absolute paths, only the part below their common folder counts.

    Args:
        records: at least two records; with `groups`, of at least two groups.
        fraction: fraction of the validation set. Both sets have at least one record (with `groups`, one group).
        seed: another seed gives another split.
        groups: images whose names are equal up to the last number (`sequences_of`) stay in the same set.

    Raises:
        ListError: there are fewer than two records, or fewer than two groups.
    """
    paths = [record["fpath_img"] for record in records]
    if all(map(os.path.isabs, paths)) and len(paths) > 1:
        folder = os.path.commonpath(paths)
        paths = [os.path.relpath(path, folder) for path in paths]
    names = [name for name, _ in sequences_of(paths)] if groups else [Path(path).as_posix() for path in paths]
    members: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        members[name].append(i)
    if len(members) < 2:
        kind = "one group of names (DATASET.val_groups)" if groups and len(records) > 1 else "one image"
        raise ListError(f"DATASET.val_fraction {fraction:g} cannot split the images, because there is only {kind}")
    wanted, chosen = fraction * len(records), set()
    order = sorted(members, key=lambda name: hashlib.sha256(f"{seed} {name}".encode(errors="replace")).digest())
    for name in order:
        size = len(members[name])
        # Add a group if that brings the size nearer to `wanted`, but keep one group for training.
        if len(chosen) + size / 2 <= wanted and len(chosen) + size < len(records):
            chosen.update(members[name])
    if not chosen:
        chosen.update(members[min(order, key=lambda name: len(members[name]))])
    return tuple([r for i, r in enumerate(records) if (i in chosen) == part] for part in (False, True))


def sequences_of(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Return the part of every path before the last number in the file name, and this number (-1 without a number).

    Numbers in a suffix that all file names have, such as `_leftImg8bit`, are not considered.
    """
    stems = [Path(path).stem for path in paths]
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*(stem[::-1] for stem in stems), strict=False))
    suffix = "".join(column[0] for column in letters)[::-1].lstrip("0123456789")
    return [_sequence_of(path, stem.removesuffix(suffix)) for path, stem in zip(paths, stems, strict=True)]


def _sequence_of(path: str, stem: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", stem, re.DOTALL)
    if not match:
        return path, -1
    start, number, _ = match.groups()
    return Path(path).with_name(f"{start}#").as_posix(), int(number)


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
