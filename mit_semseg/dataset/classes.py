"""Class tables, which contain class names, colors, and the class index of every raw label value."""

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

from ..lib.utils import UserError, shorten_list
from .image_io import ImageFileError

TABLE_FOLDER = Path(__file__).parent / "tables"
BUILT_IN_TABLES = ("ade20k", "cityscapes", "pascal_voc")
IGNORE = -1  # ignore index; losses and metrics skip pixels with this index
MAX_UNKNOWN_COLORS = 5  # maximum number of unknown colors that an error message names
MANY_COLORS = 32  # labels with more unknown colors were compressed or resized
UNKNOWN = -2  # index of raw values that are not in the table
RAW_VALUES = 65536  # number of possible raw label values (16 bits)
# Default colors. The Euclidean distance of any two is at least 60 in RGB, and as large as possible in CIELAB.
PALETTE = (
    "2d69d2", "f0871e", "2d963c", "d22d2d", "ffd2e1", "00ffff", "5a3c2d", "a51e78", "f0f078", "007896",
    "87780f", "e196ff", "87b496", "69ffb4", "d28769", "785a87", "005a3c", "96c3ff", "ff87b4", "96003c",
    "0fc3e1", "2d5a00", "1eb487", "96b44b", "d2f0b4", "690fa5", "871e00", "69784b", "69ff00", "3c3c87",
    "8787d2", "c369b4", "a5ff78", "ff4b78", "4ba5ff", "ffc33c", "a55a4b", "ff2de1", "5ad269", "4bc3c3",
)  # fmt: skip
ONE_CLASS_WARNING = (
    "all labelled pixels belong to class {}, so the model learns nothing. If label value 0 is a class, list all "
    "classes, e.g. DATASET.num_class 2 DATASET.classes [background, object]. To count the pixels of every class, run "
    "python -m mit_semseg.dataset.doctor"
)


class ClassTableError(UserError, ValueError):
    """A class table cannot be used."""


@dataclass(frozen=True)
class ClassTable:
    """Names, colors and label values of the classes in a dataset, ordered by class index."""

    names: tuple[str, ...]
    colors: np.ndarray  # (num_class, 3) uint8, RGB
    index: np.ndarray  # (65536,) int64, class index of every raw label value; -1 if ignored, -2 if not in the table
    raw: np.ndarray  # (num_class,) int32, the first listed raw label value of every class
    variants: Mapping[str, "ClassTable"] = field(default_factory=dict)  # tables for files whose name ends with the key
    # For labels with colors: R + 256 * G + 65536 * B -> raw label value
    raw_of_color: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_raw_values(
        cls, names: Sequence[str], colors: Sequence[Sequence[int]], raw: Sequence[int], ignored: int | None = None
    ) -> "ClassTable":
        """Build a table in which every class has one raw label value; `ignored` is an ignored value."""
        index = np.full(RAW_VALUES, UNKNOWN, np.int64)
        if ignored is not None:
            index[ignored] = IGNORE
        index[raw] = np.arange(len(raw))
        return cls(tuple(names), np.array(colors, np.uint8), index, np.array(raw, np.int32))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def color_labels(self) -> bool:
        """Whether the labels of the dataset contain colors instead of raw values."""
        return bool(self.raw_of_color)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Class names without synonyms (after `;` in ADE20K). If a short name is not unique, the full name is used."""
        short = [name.split(";")[0] for name in self.names]
        counts = Counter(short)
        return tuple(name if counts[s] > 1 else s for name, s in zip(self.names, short, strict=True))

    def for_file(self, path: str | os.PathLike) -> "ClassTable":
        """Return the variant that matches the end of a label file's name, or this table if none matches."""
        return next((table for suffix, table in self.variants.items() if str(path).endswith(suffix)), self)

    @cached_property
    def ignored_value(self) -> int | None:
        """The smallest raw label value that is ignored, or None. With `color_labels`, it has a color."""
        raw = self.raw_of_color.values() if self.color_labels else np.flatnonzero(self.index == IGNORE).tolist()
        return min((value for value in raw if self.index[value] == IGNORE), default=None)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Convert class indices (H, W) to raw label values: uint8, or uint16 for a table with values above 255.

        Index -1 (`IGNORE`) becomes `ignored_value`; without such a value, all indices must be at least 0. With
        `color_labels`, return the colors (H, W, 3) uint8 of these values.
        """
        if self.color_labels:
            ignored = [color for color, raw in self.raw_of_color.items() if raw == self.ignored_value][:1]
            colors = np.array(ignored, "<u4").view(np.uint8).reshape(-1, 4)[:, :3]
            return np.concatenate([self.colors, colors])[indices]
        raw = np.append(self.raw, [] if self.ignored_value is None else self.ignored_value)
        return raw.astype(np.uint8 if raw.max() < 256 else np.uint16)[indices]

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Convert raw label values (H, W) to class indices int64 (-1 if ignored, -2 if not in the table)."""
        return self.index.take(raw)

    def label_values(self, index: int) -> list[str]:
        """Return the raw values, or with `color_labels` the colors (#rrggbb), of a class or of `IGNORE`."""
        if self.color_labels:
            colors = [color for color, raw in self.raw_of_color.items() if self.index[raw] == index]
            return [f"#{color.to_bytes(3, 'little').hex()}" for color in colors]
        return [str(raw) for raw in np.flatnonzero(self.index == index)]

    def values_of_colors(self, colors: np.ndarray) -> np.ndarray:
        """Convert colors (H, W) int32, see `raw_of_color`, to raw label values (H, W) int32.

        Raises:
            ImageFileError: a color is not in the table. The message names the most frequent unknown colors.
        """
        known = np.array(sorted(self.raw_of_color), np.int32)
        position = np.searchsorted(known, colors).clip(max=len(known) - 1)
        if (unknown := known[position] != colors).any():
            raise ImageFileError(self._describe_unknown(*np.unique(colors[unknown], return_counts=True)))
        return np.array([self.raw_of_color[color] for color in known.tolist()], np.int32)[position]

    def _describe_unknown(self, colors: np.ndarray, counts: np.ndarray) -> str:
        rgb = np.stack([colors & 255, colors >> 8 & 255, colors >> 16], 1)
        parts = []
        for i in np.argsort(-counts, kind="stable")[:MAX_UNKNOWN_COLORS]:
            nearest = ((self.colors.astype(int) - rgb[i]) ** 2).sum(1).argmin()
            color = "#{:02x}{:02x}{:02x}".format(*rgb[i])
            parts.append(f"{color} ({counts[i]} pixels, nearest class {self.labels[nearest]})")
        more = f" and {len(colors) - len(parts)} more" if len(colors) > len(parts) else ""
        text = f"{len(colors)} colors of the label are not in the class table: {', '.join(parts)}{more}; "
        if len(colors) > MANY_COLORS:
            return text + "this many colors come from JPEG compression or resizing; export the labels again as PNG"
        return text + "add them to DATASET.classes (without a name: ignored), or correct the label"

    def describe_raw_values(self) -> str:
        """Return a text with all raw label values in the table, e.g. `0-10, ignored 11`."""
        parts = []
        for prefix, mask in (("", self.index >= 0), ("ignored ", self.index == IGNORE)):
            if mask.any():
                values = np.flatnonzero(mask)
                runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
                parts.append(prefix + ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs))
        return ", ".join(parts)


def class_table(
    classes: str | Sequence[str] = "",
    num_class: int = 150,
    ignore_values: Sequence[int] = (),
    label_format: str = "gray",
) -> ClassTable:
    """Build a class table. Raise ClassTableError if it cannot be read or does not have `num_class` classes.

    Args:
        classes: one of `BUILT_IN_TABLES`, the path of a CSV file, a list of names, or ''. With '' and 150 classes, the
            table is ADE20K. With '' and another number of classes, raw value 0 is ignored, and raw values 1 to
            `num_class` are the classes. 'cityscapes' reads *labelTrainIds.png as train ids, other files as label ids.
        ignore_values: raw values to ignore. Names in a list are assigned to the other raw values in ascending order.
        label_format: with 'colors', the colors in the table select the class of a pixel; every class needs a color.
    """
    colors = label_format == "colors"
    if not isinstance(classes, str):
        table = _table_from_names([str(name).strip() for name in classes], ignore_values)
    elif classes in BUILT_IN_TABLES or (classes == "" and num_class == 150):
        table = read_csv(TABLE_FOLDER / f"{classes or 'ade20k'}.csv", colors)
        if classes == "cityscapes":
            table = replace(table, variants={"labelTrainIds.png": read_csv(TABLE_FOLDER / "cityscapes_train_ids.csv")})
    elif classes == "":
        table = _table_from_names([f"class {i + 1}" for i in range(num_class)], (0,))
    else:
        table = read_csv(Path(classes), colors)
    if colors and not table.color_labels:
        raise ClassTableError(
            "DATASET.label_format colors needs a class table with colors; set DATASET.classes to a CSV"
        )
    if len(table) != num_class:
        raise ClassTableError(f"class table {classes} has {len(table)} classes, but DATASET.num_class is {num_class}")
    return table


def class_names(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of classes in the order of their indices; `classes`: see `class_table`, except ''."""
    if not isinstance(classes, str):
        return tuple(map(str, classes))
    return read_csv(TABLE_FOLDER / f"{classes}.csv" if classes in BUILT_IN_TABLES else Path(classes)).names


def class_table_from_options(options) -> ClassTable:
    """Build a class table from the DATASET options. Missing options have their defaults."""
    names = ("classes", "num_class", "ignore_values", "label_format")
    return class_table(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def read_csv(path: Path, color_labels: bool = False) -> ClassTable:
    """Read a class table from a CSV file with the columns `raw`, `name` and optionally `color` (#rrggbb).

    Raw values with the same name belong to one class. Raw values without a name are ignored. The columns may also
    be called `Idx` and `Name`, as in ADE20K's object150_info.csv; then raw value 0 is ignored. Without a column `raw`,
    the raw values are 0, 1, ... With `color_labels`, every class needs a color, and rows without a name can have
    colors, which are then ignored.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ClassTableError(f"class table {path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
    numbered = not {"raw", "idx"} & set(columns)
    if "name" not in columns or (numbered and "color" not in columns):
        found = ",".join(columns) or "no columns"
        raise ClassTableError(f"class table {path} must have the columns raw,name and optionally color; found {found}")
    colors: dict[str, tuple[int, int, int] | None] = {}
    names: dict[int, str] = {0: ""} if "idx" in columns else {}
    name_of_color: dict[int, str] = {}
    raw_of_color: dict[int, int] = {}
    for number, row in enumerate(reader):
        where = f"class table {path}, line {reader.line_num}"
        if any(row.get(None, ())):
            raise ClassTableError(
                f"{where}: there are more values than columns; put names that contain commas in quotes"
            )
        raw_text = str(number) if numbered else (row["raw"] if "raw" in row else row["idx"]) or ""
        if not re.fullmatch(r"\s*\d{1,5}\s*", raw_text) or int(raw_text) >= RAW_VALUES:
            raise ClassTableError(f"{where}: raw value {raw_text!r} is not an integer in 0..{RAW_VALUES - 1}")
        hex_color = (row.get("color") or "").strip().lstrip("#")
        if not re.fullmatch("([0-9a-fA-F]{6})?", hex_color):
            raise ClassTableError(f"{where}: color {hex_color!r} does not have the form #rrggbb")
        raw, name = int(raw_text), " ".join((row["name"] or "").split())
        if names.setdefault(raw, name) != name:
            raise ClassTableError(f"{where}: raw value {raw} has two names, {names[raw]!r} and {name!r}; remove one")
        if name and (hex_color or name not in colors):
            colors[name] = tuple(bytes.fromhex(hex_color)) or None
        if hex_color and color_labels:
            color = int.from_bytes(bytes.fromhex(hex_color), "little")
            other = name_of_color.get(color, "")
            if name and other not in ("", name):
                raise ClassTableError(f"{where}: {other!r} and {name!r} have the color #{hex_color}; change one color")
            if name or color not in raw_of_color:  # a class precedes ignored raw values with its color
                name_of_color[color], raw_of_color[color] = name, raw
    if not colors:
        raise ClassTableError(f"class table {path} has no row with a class name")
    if color_labels and (missing := [name for name, color in colors.items() if color is None]):
        raise ClassTableError(
            f"class table {path}: DATASET.label_format colors needs a color for {shorten_list(missing)}"
        )
    return replace(_make_table(list(colors), names, list(colors.values())), raw_of_color=raw_of_color)


def _table_from_names(names: Sequence[str], ignore_values: Sequence[int]) -> ClassTable:
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ClassTableError(
            f"DATASET.classes has duplicate names: {', '.join(sorted(duplicates))}; rename or remove them"
        )
    if not all(names):
        raise ClassTableError("DATASET.classes has an empty name; to ignore label values, set DATASET.ignore_values")
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
    """Return RGB colors (count, 3) uint8: `PALETTE`, then repeatedly the grid color farthest from all colors in use."""
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    colors = [(0, 0, 0), *(tuple(bytes.fromhex(color)) for color in PALETTE)]  # black is reserved for ignored pixels
    distance = np.full(len(grid), np.inf)  # squared distance of every grid color to the nearest color in use
    for i in range(min(count, len(grid)) + 1):
        if i == len(colors):
            colors.append(grid[distance.argmax()])
        distance = np.minimum(distance, ((grid - colors[i]) ** 2).sum(1))
    return np.resize(colors[1:], (count, 3)).astype(np.uint8)
