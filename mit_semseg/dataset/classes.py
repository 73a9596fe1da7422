"""Class tables: names, colors, and the mapping between raw label values and class indices."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..lib.utils import UserError

TABLE_FOLDER = Path(__file__).parent / "tables"
BUILT_IN_TABLES = ("ade20k", "cityscapes", "pascal_voc")
IGNORE = -1  # ignore index: pixels that do not count in losses and metrics
UNKNOWN = -2  # index of raw values that are not in the table
RAW_VALUES = 65536
# Pairwise distances are at least 60 in RGB (maximum 442), and as large as possible in CIELAB.
PALETTE = (
    "2d69d2", "f0871e", "2d963c", "d22d2d", "ffd2e1", "00ffff", "5a3c2d", "a51e78", "f0f078", "007896",
    "87780f", "e196ff", "87b496", "69ffb4", "d28769", "785a87", "005a3c", "96c3ff", "ff87b4", "96003c",
    "0fc3e1", "2d5a00", "1eb487", "96b44b", "d2f0b4", "690fa5", "871e00", "69784b", "69ff00", "3c3c87",
    "8787d2", "c369b4", "a5ff78", "ff4b78", "4ba5ff", "ffc33c", "a55a4b", "ff2de1", "5ad269", "4bc3c3",
)  # fmt: skip
_LINE_BREAKS = re.compile(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*")
ONE_CLASS_WARNING = (
    "all labelled pixels belong to class {}: the model learns nothing and the metrics are meaningless. If raw value 0 "
    "is a class (background), list all classes from value 0 on, e.g. DATASET.num_class 2 DATASET.classes [background, "
    "object]. python -m mit_semseg.dataset.doctor counts the pixels per class"
)


class ClassTableError(UserError, ValueError):
    """A class table cannot be used."""


@dataclass(frozen=True)
class ClassTable:
    """Classes of a dataset.

    Attributes:
        names: class names, in the order of the class indices.
        colors: (num_class, 3) uint8, RGB.
        index: (65536,) int64, class index of every raw label value; -1 is ignored, -2 is not in the table.
        raw: (num_class,) int32, the first raw label value of every class.
        variants: tables for label files with other raw values, by the suffix of the file name.
    """

    names: tuple[str, ...]
    colors: np.ndarray
    index: np.ndarray
    raw: np.ndarray
    variants: Mapping[str, "ClassTable"] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Short unique names: the part before the first semicolon, where ADE20K lists synonyms, if it is unique."""
        short = [name.split(";")[0] for name in self.names]
        counts = Counter(short)
        return tuple(name if counts[s] > 1 else s for name, s in zip(self.names, short, strict=True))

    def for_file(self, path: str | os.PathLike) -> "ClassTable":
        """Return the table for a label file: the variant for the suffix of its name, or this table."""
        name = Path(path).name
        return next((table for suffix, table in self.variants.items() if name.endswith(suffix)), self)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Convert class indices (H, W) >= 0 to raw label values, uint8 if all of the table fit, else uint16."""
        return self.raw.astype(np.uint8 if self.raw.max() < 256 else np.uint16)[indices]

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Convert raw label values (H, W) to class indices int64; -1 is ignored, -2 is not in the table."""
        return self.index.take(raw)

    def describe_raw_values(self) -> str:
        """Return the raw values for error messages, e.g. `0-10, ignored 11`."""
        used, ignored = _format_ranges(self.index >= 0), _format_ranges(self.index == IGNORE)
        return f"{used}, ignored {ignored}" if ignored else used


def _format_ranges(mask: np.ndarray) -> str:
    values = np.flatnonzero(mask)
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1) if len(values) else []
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def class_table(
    classes: str | Sequence[str] = "", num_class: int = 150, ignore_values: Sequence[int] = ()
) -> ClassTable:
    """Build the class table for DATASET.classes, num_class and ignore_values.

    Args:
        classes: one of `BUILT_IN_TABLES`, the path of a CSV file, a list of names, or ''. '' is ADE20K if `num_class`
            is 150; otherwise classes are numbered, raw value 0 is ignored and raw value v is class v - 1. 'cityscapes'
            reads labelIds, and train ids in files *labelTrainIds.png.
        num_class: expected number of classes.
        ignore_values: raw values to ignore; the names of a list get the other raw values, from 0 on.

    Raises:
        ClassTableError: the table cannot be read or has another number of classes.
    """
    if not isinstance(classes, str):
        table = _table_from_names([str(name) for name in classes], ignore_values)
    elif classes in BUILT_IN_TABLES or (classes == "" and num_class == 150):
        table = read_csv(TABLE_FOLDER / f"{classes or 'ade20k'}.csv")
        if classes == "cityscapes":
            table = replace(table, variants={"labelTrainIds.png": read_csv(TABLE_FOLDER / "cityscapes_train_ids.csv")})
    elif classes == "":
        table = _table_from_names([f"class {i + 1}" for i in range(num_class)], (0,))
    else:
        table = read_csv(Path(classes))
    if len(table) != num_class:
        raise ClassTableError(
            f"class table {classes or 'by number'} has {len(table)} classes, but DATASET.num_class is {num_class}; "
            f"change one of them"
        )
    return table


def class_table_from_options(options) -> ClassTable:
    """Build the class table from the DATASET options; attributes that `options` lacks keep their default."""
    names = {"classes": "", "num_class": 150, "ignore_values": ()}
    return class_table(**{name: getattr(options, name, default) for name, default in names.items()})


def read_csv(path: Path) -> ClassTable:
    """Read a CSV file with the columns `raw`, `name` and optionally `color` (#rrggbb).

    Rows with the same name put several raw values into one class. Rows without a name are ignored values. The columns
    `Idx` and `Name` of ADE20K's object150_info.csv are also supported; raw value 0 is ignored there. Raises
    ClassTableError if the file cannot be read or a row is wrong.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ClassTableError(f"class table {path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
    if not {"raw", "idx"} & set(columns) or "name" not in columns:
        found = ",".join(columns) or "no columns"
        raise ClassTableError(f"class table {path} needs the columns raw,name and optionally color; found {found}")
    colors: dict[str, tuple[int, int, int] | None] = {}
    names: dict[int, str] = {} if "raw" in columns else {0: ""}
    for row in reader:
        where = f"class table {path}, line {reader.line_num}"
        raw, name, color = _parse_row(row, where)
        if names.get(raw, name) != name:
            raise ClassTableError(f"{where}: raw value {raw} has two names, {names[raw]!r} and {name!r}; remove one")
        names[raw] = name
        if name and (color or name not in colors):
            colors[name] = color
    if not colors:
        raise ClassTableError(f"class table {path} has no row with a name")
    return _make_table(list(colors), names, list(colors.values()))


def _parse_row(row: Mapping, where: str) -> tuple[int, str, tuple[int, ...] | None]:
    """Return raw value, name ('' if ignored) and color (None if empty) of a row."""
    raw = (row["raw"] if "raw" in row else row["idx"]) or ""
    if not re.fullmatch(r"\s*\d{1,5}\s*", raw) or int(raw) >= RAW_VALUES:
        raise ClassTableError(f"{where}: raw value {raw!r} is not an integer in 0..{RAW_VALUES - 1}")
    text = (row.get("color") or "").strip().lstrip("#")
    try:
        color = tuple(bytes.fromhex(text)) if text else None
    except ValueError:
        color = ()
    if color is not None and len(color) != 3:
        raise ClassTableError(f"{where}: color {text!r} does not have the form #rrggbb")
    return int(raw), _LINE_BREAKS.sub(" ", (row["name"] or "").strip()), color


def _table_from_names(names: Sequence[str], ignore_values: Sequence[int]) -> ClassTable:
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ClassTableError(f"duplicate class names in DATASET.classes: {', '.join(sorted(duplicates))}")
    free = (value for value in range(RAW_VALUES) if value not in set(ignore_values))
    return _make_table(names, dict.fromkeys(ignore_values, "") | dict(zip(free, names, strict=False)))


def _make_table(names: Sequence[str], name_of_raw: dict[int, str], colors: Sequence[tuple | None] = ()) -> ClassTable:
    index, first_raw = np.full(RAW_VALUES, UNKNOWN, np.int64), np.zeros(len(names), np.int32)
    index_of_name = {name: i for i, name in enumerate(names)} | {"": IGNORE}
    for raw, name in reversed(name_of_raw.items()):
        index[raw] = index_of_name[name]
        if name:
            first_raw[index_of_name[name]] = raw
    all_colors = distinct_colors(len(names))
    for i, color in enumerate(colors):
        if color:
            all_colors[i] = color
    return ClassTable(tuple(names), all_colors, index, first_raw)


def distinct_colors(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB colors: `PALETTE`, then the color of a grid that is farthest from all previous ones.

    Black is avoided, because ignored pixels are black.
    """
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    colors = np.array([tuple(bytes.fromhex(color)) for color in PALETTE])
    distance = np.full(len(grid), np.inf)  # squared, to the nearest color that is already used
    for color in ((0, 0, 0), *colors):
        distance = np.minimum(distance, ((grid - color) ** 2).sum(1))
    while len(colors) < min(count, len(grid)):
        farthest = grid[distance.argmax()]
        colors = np.vstack([colors, farthest])
        distance = np.minimum(distance, ((grid - farthest) ** 2).sum(1))
    return np.resize(colors, (count, 3)).astype(np.uint8)
