"""Lists of images: odgt files, split lists and folder pairs become records {fpath_img, fpath_segm, width, height}."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..lib.utils import TEXT, atomic_write
from .layouts import VOC_IMAGES, VOC_LABELS, VOC_LISTS, ListError, Record, read_lines, read_split, scan_pairs


def load_records(
    source: str | os.PathLike | Iterable[Mapping], root: str | os.PathLike = "", problems: list[str] | None = None
) -> list[Record]:
    """Records of a list.

    Args:
        source: an odgt file (one JSON object, or the paths of an image and its label, a line); a split list of PASCAL
            VOC (`ImageSets/.../NAME.txt`, one stem a line); a folder that holds `images/` and `annotations/`, or whose
            path has a part `images` with a twin `annotations`, or the same with `leftImg8bit` and `gtFine` as
            Cityscapes has them; or records themselves. A list is looked for as it stands, then below `root`; a folder
            or split list the other way round.
        root: folder that the paths in records are relative to.
        problems: gets a sentence for every file of a folder that has no partner, and every line of a list that is no
            record, instead of an error.

    Raises:
        ListError: the list is missing, empty or broken, or images and annotations do not pair up.
    """
    if not isinstance(source, (str, os.PathLike)):
        records = [dict(record) for record in source]
        for i, record in enumerate(records):
            _require(record, f"record {i}")
        return records
    path = Path(source)
    for place in (Path(root) / path, path):
        if place.is_dir():
            return scan_pairs(place, root, problems)
        if place.is_file() and VOC_LISTS in place.absolute().parts:
            return read_split(place, root, problems)
    for place in (path, Path(root) / path):
        if place.is_file():
            return _read_odgt(place, problems)
    if root and not Path(root).is_dir():
        raise ListError(
            f"DATASET.root_dataset {root} does not exist: there is no folder {Path(root).absolute()} (relative paths "
            f"start at the working directory); it should contain {path}"
        )
    raise ListError(
        f"there is no list or folder {path} in {Path(root).absolute()} or {Path.cwd()}: for ADE20K run "
        f"./download_ade20k.sh; for your own images name a folder with images/ and annotations/ in DATASET.list_train "
        f"and DATASET.list_val; for Cityscapes a folder such as leftImg8bit/train, for PASCAL VOC a list such as "
        f"ImageSets/Segmentation/train.txt"
    )


def _require(record: Mapping, where: str) -> None:
    """Check what the rest relies on."""
    if not isinstance(record.get("fpath_img"), str) or not record["fpath_img"]:
        raise ListError(f"{where}: no fpath_img")
    for key in ("fpath_img", "fpath_segm"):
        if not isinstance(record.get(key, ""), str) or "\0" in record.get(key, ""):
            raise ListError(f"{where}: {key} {record[key]!r} is no path")
    for key in ("width", "height"):
        if not isinstance(record.get(key, 1), (int, float)) or not 0 <= record.get(key, 1) < math.inf:
            raise ListError(f"{where}: {key} {record[key]!r} is no number of pixels")


def _record(line: str, where: str) -> Record:
    words = line.split()
    if len(words) == 2 and not line.lstrip().startswith(("{", "[")):
        return dict(zip(("fpath_img", "fpath_segm"), words, strict=True))
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ListError(
            f"{where}: no JSON object ({getattr(error, 'msg', error)}); a list has one a line, or the paths of an "
            f"image and its label, or is a split list of PASCAL VOC in a folder {VOC_LISTS} beside {VOC_IMAGES} and "
            f"{VOC_LABELS}"
        ) from None
    if not isinstance(record, dict):
        raise ListError(f"{where}: expected a JSON object, found {type(record).__name__}")
    _require(record, where)
    return record


def _read_odgt(path: Path, problems: list[str] | None) -> list[Record]:
    records, lines = [], read_lines(path)
    if lines[0].lstrip().startswith("["):
        raise ListError(
            f"list {path} is a JSON array; a list has one JSON object a line: jq -c '.[]' {path} > {path.stem}.odgt"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(line, f"{path}, line {number}"))
        except ListError as error:
            if problems is None:
                raise
            problems.append(str(error))
    if not records:
        raise ListError(f"list {path} is empty" if not problems else f"list {path} has no usable line; {problems[0]}")
    return records


def write_odgt(records: Iterable[Mapping], path: str | os.PathLike) -> None:
    """Write records to an odgt file, one JSON object a line; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.write_text("".join(lines), **TEXT)
