"""Check every image and label of a dataset.

    python -m mit_semseg.dataset.doctor --cfg config/NAME.yaml [KEY VALUE ...]

Prints image sizes, orientations, the fraction of pixels per class, unusable files and list lines, and unusual
properties of usable files. Exit codes: 0 if all files can be used, 1 if some cannot, 2 if an option or list is invalid.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ..config import add_config_arguments, load_config
from ..lib.utils import UserError, prepare_streams, progress_bar, shorten_list
from .classes import IGNORE, ClassTable
from .datasets import ValDataset
from .image_io import orientation_mismatch, unusual_properties
from .records import load_records

MAX_EXAMPLES = 3  # maximum number of printed problems with the same cause
_FILES_AND_NUMBERS = re.compile(r"^.*?(?=: | has no partner| is missing)|has no partner .*|[0-9]+x?")


@dataclass
class DatasetReport:
    """Results of the checks of one image list."""

    source: str  # name of the list
    table: ClassTable
    images: int  # number of records in the list
    sizes: Counter = field(default_factory=Counter)  # number of usable images per (width, height)
    problems: list[str] = field(default_factory=list)  # one message per unusable file or line
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # unusual property -> image paths

    def __post_init__(self):
        self.pixels = np.zeros(len(self.table) + 1, np.int64)  # number of pixels per class, then ignored pixels
        self.images_per_class = np.zeros(len(self.table) + 1, np.int64)  # number of images with pixels of each class

    def format(self) -> str:
        """Return the report as text."""
        lines = [f"{self.source}: {self.images} images, {len(self.problems)} problems", *self._statistics()]
        lines += [f"  note: {note} ({len(images)}): {shorten_list(images, 20)}" for note, images in self.notes.items()]
        lines += [f"  UNUSABLE {line}" for line in group_by_cause(self.problems)]
        return "\n".join(lines)

    def _statistics(self) -> Iterator[str]:
        if not self.sizes:
            return
        widths, heights = zip(*self.sizes, strict=True)
        (width, height), count = self.sizes.most_common(1)[0]
        portrait = sum(count for (w, h), count in self.sizes.items() if h > w)
        ranges = f"width {min(widths)}..{max(widths)}, height {min(heights)}..{max(heights)}"
        yield f"  sizes: {ranges}, most frequent {width}x{height} ({count} images)"
        yield f"  orientations: {portrait} portrait, {sum(self.sizes.values()) - portrait} landscape or square"
        names = (*self.table.labels, "(ignored)")
        column = max(map(len, names))
        yield f"  {'class':<{column}}       pixels  images"
        for i in (*np.argsort(-self.pixels[:-1], kind="stable"), -1):
            if self.pixels[i]:
                percent = 100 * self.pixels[i] / self.pixels.sum()
                yield f"  {names[i]:<{column}}  {percent:>9.3f} %  {self.images_per_class[i]:>6}"
        if absent := [name for name, pixels in zip(names[:-1], self.pixels[:-1], strict=True) if not pixels]:
            yield f"  classes without pixels ({len(absent)}): {', '.join(absent)}"


def group_by_cause(problems: Sequence[str]) -> list[str]:
    """Group problems that differ only in file names and numbers. Return at most `MAX_EXAMPLES` of each group."""
    causes: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        causes[_FILES_AND_NUMBERS.sub("", problem)].append(problem)
    lines = []
    for group in causes.values():
        lines += group[:MAX_EXAMPLES]
        if len(group) > MAX_EXAMPLES:
            lines.append(f"... and {len(group) - MAX_EXAMPLES} more with the same cause")
    return lines


def _inspect_record(dataset: ValDataset, record: dict) -> tuple[tuple[int, int], np.ndarray, list[str]] | UserError:
    """Return (size, number of pixels per class with ignored pixels last, notes), or the error of an unusable record."""
    try:
        image, label, table = dataset.load_pair(record)
    except UserError as error:
        return error
    size = record.get("width", image.width), record.get("height", image.height)
    if size != image.size:
        return UserError(f"{record['fpath_img']}: the list has size {size}, the file {image.size}; correct the list")
    notes = unusual_properties(dataset.path(record, "fpath_img"))
    if mismatch := orientation_mismatch(image, label):
        notes.append(mismatch)
    if any(Path(record[key]).is_absolute() or ".." in Path(record[key]).parts for key in ("fpath_img", "fpath_segm")):
        notes.append("path outside DATASET.root_dataset")
    classes, count = table.encode(np.asarray(label)), len(table)
    return image.size, np.bincount(np.where(classes == IGNORE, count, classes).ravel(), minlength=count + 1), notes


def inspect_dataset(dataset: ValDataset, source: str) -> DatasetReport:
    """Load and check every image and label of a dataset. The report shows `source` as the name of the list."""
    report, records = DatasetReport(source, dataset.table, len(dataset.records)), dataset.records
    with ThreadPoolExecutor() as pool:
        results = pool.map(partial(_inspect_record, dataset), records)
        bar = progress_bar(results, total=len(records), desc=source, unit="img")
        for record, result in zip(records, bar, strict=True):
            if isinstance(result, UserError):
                report.problems.append(str(result))
                continue
            size, pixels, notes = result
            report.sizes[size] += 1
            report.pixels += pixels
            report.images_per_class += pixels > 0
            for note in notes:
                report.notes[note].append(record["fpath_img"])
    return report


def main() -> int:
    """Check the training list and the validation list of a configuration. Return the exit code."""
    prepare_streams()
    parser = argparse.ArgumentParser("python -m mit_semseg.dataset.doctor", description="Check all images and labels.")
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    code = 0
    try:
        options = load_config(args.cfg, args.opts).DATASET
        for source in dict.fromkeys((options.list_train, options.list_val)):
            problems: list[str] = []
            records = load_records(source, options.root_dataset, problems)
            report = inspect_dataset(ValDataset(options.root_dataset, records, options), source)
            report.problems[:0] = problems
            print(report.format())
            code = 1 if report.problems else code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("all files can be used" if code == 0 else "some files cannot be used, see UNUSABLE above")
    return code


if __name__ == "__main__":
    sys.exit(main())
