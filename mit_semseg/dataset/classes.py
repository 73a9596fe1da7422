"""Class tables: name, colour, and which raw label value is which class."""

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

TABLES = Path(__file__).parent / "tables"
NAMED = ("ade20k", "cityscapes", "pascal_voc")  # tables that come with the package
IGNORE = -1  # label of a pixel that takes no part in losses and metrics
UNKNOWN = -2  # marks raw values that a table does not have
RAW_VALUES = 65536
# Pairwise distances are at least 60 in RGB (of at most 442), and as large as possible in CIELAB.
PALETTE = (
    "2d69d2", "f0871e", "2d963c", "d22d2d", "ffd2e1", "00ffff", "5a3c2d", "a51e78", "f0f078", "007896",
    "87780f", "e196ff", "87b496", "69ffb4", "d28769", "785a87", "005a3c", "96c3ff", "ff87b4", "96003c",
    "0fc3e1", "2d5a00", "1eb487", "96b44b", "d2f0b4", "690fa5", "871e00", "69784b", "69ff00", "3c3c87",
    "8787d2", "c369b4", "a5ff78", "ff4b78", "4ba5ff", "ffc33c", "a55a4b", "ff2de1", "5ad269", "4bc3c3",
)  # fmt: skip
_BREAKS = re.compile(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*")  # replaced by a space in class names
ONE_CLASS_WARNING = (
    "all labelled pixels belong to class {}: there is nothing to learn, and the scores are meaningless. If raw value 0 "
    "is a class (background), list all classes from value 0 on, e.g. DATASET.num_class 2 DATASET.classes [background, "
    "object]; python -m mit_semseg.dataset.doctor counts the pixels per class"
)


class ClassTableError(UserError, ValueError):
    """A class table that cannot be used; the message says why."""


@dataclass(frozen=True)
class ClassTable:
    """Classes of a data set.

    Attributes:
        names: one per class; index in this tuple = class index.
        colors: (num_class, 3) uint8, RGB.
        index: (65536,) int64, class index of every raw label value; -1 ignored, -2 not in the table.
        raw: (num_class,) int32, a raw label value of every class: the first that stands in the table.
        variants: endings of label files whose raw values are others, each with its table of the same classes.
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
        """Names short enough to show, without the synonyms ADE20K lists after a semicolon, but never two alike."""
        short = [name.split(";")[0] for name in self.names]
        times = Counter(short)
        return tuple(name if times[s] > 1 else s for name, s in zip(self.names, short, strict=True))

    def of_file(self, path: str | os.PathLike) -> "ClassTable":
        """The table for a label file: this one, or the variant that goes by the file's ending."""
        name = Path(path).name
        return next((table for ending, table in self.variants.items() if name.endswith(ending)), self)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Raw label values of class indices (H, W) >= 0, uint8 where they fit, else uint16."""
        return self.raw.astype(np.uint8 if self.raw.max() < 256 else np.uint16)[indices]

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Class indices (H, W) int64 of raw label values, -1 where ignored, -2 where the table has no such value."""
        return self.index.take(raw)

    def raw_values(self) -> str:
        """The raw values of the table, for messages, e.g. `0-10, ignored 11`."""
        used, ignored = np.flatnonzero(self.index >= 0), np.flatnonzero(self.index == IGNORE)
        text = _ranges(used)
        return f"{text}, ignored {_ranges(ignored)}" if len(ignored) else text


def _ranges(values: np.ndarray) -> str:
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1) if len(values) else []
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def class_table(
    classes: str | Sequence[str] = "", num_class: int = 150, ignore_values: Sequence[int] = ()
) -> ClassTable:
    """The class table that the options name.

    Args:
        classes: one of `NAMED`; a CSV file; a list of names; or '' for ADE20K if `num_class` is 150, else numbered
            classes with raw value 0 unlabelled and raw value v class v - 1. 'cityscapes' understands labelIds, and
            train ids in files *labelTrainIds.png.
        num_class: number of classes expected.
        ignore_values: with a list of names, raw values to ignore; the names go to the other values from 0 upwards.

    Raises:
        ClassTableError: the table cannot be read or has another number of classes.
    """
    if not isinstance(classes, str):
        table = _from_names([str(name) for name in classes], ignore_values)
    elif classes in NAMED or (classes == "" and num_class == 150):
        table = read_csv(TABLES / f"{classes or 'ade20k'}.csv")
        if classes == "cityscapes":
            table = replace(table, variants={"labelTrainIds.png": read_csv(TABLES / "cityscapes_train_ids.csv")})
    elif classes == "":
        table = _from_names([f"class {i + 1}" for i in range(num_class)], (0,))
    else:
        table = read_csv(Path(classes))
    if len(table) != num_class:
        raise ClassTableError(
            f"class table {classes or 'by number'} has {len(table)} classes, but DATASET.num_class is {num_class}"
        )
    return table


def read_csv(path: Path) -> ClassTable:
    """Read a table with the columns `raw`, `name` and optionally `color` (#rrggbb).

    A name that comes again puts another raw value into the same class; a row without a name is an ignored value. The
    columns of ADE20K's own list (`Idx`, `Name`) are understood too, with raw value 0 ignored.

    Raises:
        ClassTableError: unreadable, or a row is wrong (named by its line).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ClassTableError(f"class table {path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = {name.strip().lower(): name for name in reader.fieldnames or []}
    raw_column = columns.get("raw") or columns.get("idx")
    if not raw_column or "name" not in columns:
        raise ClassTableError(
            f"class table {path} needs columns raw,name and optionally color; found {', '.join(columns) or 'nothing'}"
        )
    colors: dict[str, tuple[int, int, int] | None] = {}
    raw_of: dict[int, str] = {} if "raw" in columns else {0: ""}
    for row in reader:
        line = reader.line_num
        raw, name, color = _row(path, line, row, raw_column, columns)
        if raw_of.get(raw, name) != name:
            raise ClassTableError(f"class table {path}, line {line}: raw value {raw} stands there twice")
        raw_of[raw] = name
        if name and (color or name not in colors):
            colors[name] = color
    if not colors:
        raise ClassTableError(f"class table {path} names no class")
    return _make(list(colors), raw_of, list(colors.values()))


def _row(path: Path, line: int, row: Mapping, raw_column: str, columns: Mapping[str, str]):
    where = f"class table {path}, line {line}"
    try:
        raw = int(row[raw_column])
    except (TypeError, ValueError):
        raise ClassTableError(f"{where}: raw value {row[raw_column]!r} is no whole number") from None
    if not 0 <= raw < RAW_VALUES:
        raise ClassTableError(f"{where}: raw value {raw} is outside 0 to {RAW_VALUES - 1}")
    text = (row.get(columns.get("color", "")) or "").strip().lstrip("#")
    try:
        color = tuple(bytes.fromhex(text)) if text else None
    except ValueError:
        color = ()
    if color is not None and len(color) != 3:
        raise ClassTableError(f"{where}: color {text!r} is not of the form #rrggbb")
    return raw, _BREAKS.sub(" ", (row[columns["name"]] or "").strip()), color


def _from_names(names: Sequence[str], ignore_values: Sequence[int]) -> ClassTable:
    doubles = {name for name in names if names.count(name) > 1}
    if doubles:
        raise ClassTableError(f"class names stand twice in the list: {', '.join(sorted(doubles))}")
    free = (value for value in range(RAW_VALUES) if value not in set(ignore_values))
    raw_of = dict.fromkeys(ignore_values, "") | dict(zip(free, names, strict=False))
    return _make(names, raw_of, [None] * len(names))


def _make(names: Sequence[str], raw_of: dict[int, str], colors: Sequence[tuple | None]) -> ClassTable:
    index, first = np.full(RAW_VALUES, UNKNOWN, np.int64), np.zeros(len(names), np.int32)
    position = {name: i for i, name in enumerate(names)} | {"": IGNORE}
    for raw, name in reversed(raw_of.items()):
        index[raw] = position[name]
        if name:
            first[position[name]] = raw
    filled = distinct_colors(len(names))
    for i, color in enumerate(colors):
        if color:
            filled[i] = color
    return ClassTable(tuple(names), filled, index, first)


def distinct_colors(count: int) -> np.ndarray:
    """(count, 3) uint8 RGB colours: `PALETTE`, then repeatedly the colour of a grid farthest from all previous ones."""
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    colors = np.array([tuple(bytes.fromhex(color)) for color in PALETTE])
    nearest = np.full(len(grid), np.inf)  # squared distance of every grid colour to the closest one taken
    for color in ((0, 0, 0), *colors):  # ignored pixels are drawn black
        nearest = np.minimum(nearest, ((grid - color) ** 2).sum(1))
    while len(colors) < min(count, len(grid)):
        farthest = grid[nearest.argmax()]
        colors = np.vstack([colors, farthest])
        nearest = np.minimum(nearest, ((grid - farthest) ** 2).sum(1))
    return np.resize(colors, (count, 3)).astype(np.uint8)
