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
    """Classes of a dataset, in the order of the class indices."""

    names: tuple[str, ...]
    colors: np.ndarray  # (num_class, 3) uint8, RGB
    index: np.ndarray  # (65536,) int64, class index of every raw label value; -1 is ignored, -2 is not in the table
    raw: np.ndarray  # (num_class,) int32, the first raw label value of every class
    variants: Mapping[str, "ClassTable"] = field(
        default_factory=dict
    )  # for other label files, by the end of their name

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
        return next((table for suffix, table in self.variants.items() if str(path).endswith(suffix)), self)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Convert class indices (H, W) >= 0 to raw label values, uint8 if all of the table fit, else uint16."""
        return self.raw.astype(np.uint8 if self.raw.max() < 256 else np.uint16)[indices]

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Convert raw label values (H, W) to class indices int64; -1 is ignored, -2 is not in the table."""
        return self.index.take(raw)

    def describe_raw_values(self) -> str:
        """Return the raw values for error messages, e.g. `0-10, ignored 11`."""
        parts = []
        for prefix, values in (
            ("", np.flatnonzero(self.index >= 0)),
            ("ignored ", np.flatnonzero(self.index == IGNORE)),
        ):
            runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1) if len(values) else []
            texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
            parts += [prefix + ", ".join(texts)] if texts else []
        return ", ".join(parts)


def class_table(
    classes: str | Sequence[str] = "", num_class: int = 150, ignore_values: Sequence[int] = ()
) -> ClassTable:
    """Build the class table. Raise ClassTableError if it cannot be read or does not have `num_class` classes.

    Args:
        classes: one of `BUILT_IN_TABLES`, the path of a CSV file, a list of names, or ''. '' is ADE20K if `num_class`
            is 150; otherwise classes are numbered, raw value 0 is ignored and raw value v is class v - 1. 'cityscapes'
            reads labelIds, and train ids in files *labelTrainIds.png.
        ignore_values: raw values to ignore; the names of a list get the other raw values, from 0 on.
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
        raise ClassTableError(f"class table {classes} has {len(table)} classes, but DATASET.num_class is {num_class}")
    return table


def class_table_from_options(options) -> ClassTable:
    """Build the class table from the DATASET options; attributes that `options` lacks keep their default."""
    names = ("classes", "num_class", "ignore_values")
    return class_table(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def read_csv(path: Path) -> ClassTable:
    """Read a CSV file with the columns `raw`, `name` and optionally `color` (#rrggbb).

    Rows with the same name put several raw values into one class. Rows without a name are ignored values. The columns
    `Idx` and `Name` of ADE20K's object150_info.csv are also supported; raw value 0 is ignored there.
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
        raw_text = (row["raw"] if "raw" in row else row["idx"]) or ""
        if not re.fullmatch(r"\s*\d{1,5}\s*", raw_text) or int(raw_text) >= RAW_VALUES:
            raise ClassTableError(f"{where}: raw value {raw_text!r} is not an integer in 0..{RAW_VALUES - 1}")
        hex_color = (row.get("color") or "").strip().lstrip("#")
        if not re.fullmatch("([0-9a-fA-F]{6})?", hex_color):
            raise ClassTableError(f"{where}: color {hex_color!r} does not have the form #rrggbb")
        raw, name = int(raw_text), _LINE_BREAKS.sub(" ", (row["name"] or "").strip())
        if names.setdefault(raw, name) != name:
            raise ClassTableError(f"{where}: raw value {raw} has two names, {names[raw]!r} and {name!r}; remove one")
        if name and (hex_color or name not in colors):
            colors[name] = tuple(bytes.fromhex(hex_color)) or None
    if not colors:
        raise ClassTableError(f"class table {path} has no row with a name")
    return _make_table(list(colors), names, list(colors.values()))


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
    rgb = distinct_colors(len(names))
    for i, color in enumerate(colors):
        rgb[i] = color or rgb[i]
    return ClassTable(tuple(names), rgb, index, first_raw)


def distinct_colors(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB colors: `PALETTE`, then the color of a grid that is farthest from all others."""
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    colors = [(0, 0, 0), *(tuple(bytes.fromhex(color)) for color in PALETTE)]  # ignored pixels are black
    distance = np.full(len(grid), np.inf)  # squared, to the nearest color that is already used
    for i in range(min(count, len(grid)) + 1):
        if i == len(colors):
            colors.append(grid[distance.argmax()])
        distance = np.minimum(distance, ((grid - colors[i]) ** 2).sum(1))
    return np.resize(colors[1:], (count, 3)).astype(np.uint8)
