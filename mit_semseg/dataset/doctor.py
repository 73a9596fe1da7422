"""What is wrong with a data set, file by file.

    python -m mit_semseg.dataset.doctor --cfg config/NAME.yaml [KEY VALUE ...]

opens every image and label of the training and validation lists and prints counts, sizes, orientations, the share of
every class, every file and line that cannot be used, and what is unusual about others. Exit code 0 if all is well, 1 if
a file cannot be used, 2 if a list cannot.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import add_config_arguments, load_config
from ..lib.utils import UserError, prepare_streams, shorten
from .classes import IGNORE
from .datasets import ValDataset
from .image_io import peculiarities
from .pairs import orientation_mismatch
from .records import load_records

EXAMPLES = 3  # problems listed of each cause
_FILES_AND_NUMBERS = re.compile(r"^.*?(?=: | has no partner| is missing)|has no partner .*|[0-9]+x?")


@dataclass
class Diagnosis:
    """What was found in a list."""

    source: str
    labels: tuple[str, ...]  # names of the classes
    images: int = 0
    upright: int = 0
    sizes: Counter = field(default_factory=Counter)  # (width, height) of readable images
    pixels: np.ndarray | None = None  # (num_class + 1,), the last entry counts ignored ones
    in_images: np.ndarray | None = None  # (num_class,) images that have the class
    problems: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # what is unusual: images

    def absent(self) -> list[str]:
        """Classes that no label has."""
        return [name for name, count in zip(self.labels, self.in_images, strict=True) if not count]

    def report(self) -> str:
        """The findings as text."""
        lines = [f"{self.source}: {self.images} images, {len(self.problems)} unusable"]
        if self.sizes:
            lines.append(_size_line(self.sizes))
            usable = sum(self.sizes.values())
            lines.append(f"  orientation: {self.upright} upright (higher than wide), {usable - self.upright} lying")
            lines += self._class_lines()
        if self.absent():
            lines.append(f"  classes that no label has ({len(self.absent())}): {', '.join(self.absent())}")
        lines += [f"  note: {what} ({len(names)}): {shorten(names, 20)}" for what, names in self.notes.items()]
        lines += [f"  UNUSABLE {line}" for line in grouped(self.problems)]
        return "\n".join(lines)

    def _class_lines(self) -> Iterator[str]:
        total, width = max(1, self.pixels.sum()), max(len(name) for name in (*self.labels, "(ignored)"))
        yield f"  {'class':<{width}}  share of pixels  images"
        for i in np.argsort(-self.pixels[:-1], kind="stable"):
            if self.in_images[i]:
                share = 100 * self.pixels[i] / total
                yield f"  {self.labels[i]:<{width}}  {share:>13.3f} %  {self.in_images[i]:>6}"
        yield f"  {'(ignored)':<{width}}  {100 * self.pixels[-1] / total:>13.3f} %"


def grouped(problems: Sequence[str], most: int = EXAMPLES) -> list[str]:
    """The first problems of each cause, each cause followed by the number of its further ones.

    Two problems have the same cause if their sentences differ in file names and numbers alone.
    """
    causes: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        causes[_FILES_AND_NUMBERS.sub("", problem)].append(problem)
    lines = []
    for same in causes.values():
        lines += same[:most]
        if len(same) > most:
            lines.append(f"... and {len(same) - most} more like it")
    return lines


def _size_line(sizes: Counter) -> str:
    widths, heights = [w for w, _ in sizes], [h for _, h in sizes]
    (width, height), most = sizes.most_common(1)[0]
    return (
        f"  sizes: width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}; most often "
        f"{width}x{height} ({most} images)"
    )


def _inspect(dataset: ValDataset, record: dict) -> tuple[tuple[int, int], np.ndarray, list[str]] | str:
    """Size, pixels per class and notes of a record that can be used, or why it cannot."""
    try:
        image, label = dataset.pair(record)
        notes = peculiarities(dataset.path(record, "fpath_img"), dataset.limits)
        notes += filter(None, [orientation_mismatch(image, label)])
    except UserError as error:
        return str(error)
    paths = [Path(record[key]) for key in ("fpath_img", "fpath_segm")]
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        notes.append("a path that leaves DATASET.root_dataset")
    listed = (record.get("width", image.width), record.get("height", image.height))
    if listed != image.size:
        return (
            f"{record['fpath_img']}: the list says {listed[0]}x{listed[1]}, the image is {image.width}x{image.height}"
        )
    classes = dataset.encode(label, record)
    counts = np.bincount(
        np.where(classes == IGNORE, len(dataset.table), classes).ravel(), minlength=len(dataset.table) + 1
    )
    return image.size, counts, notes


def diagnose(dataset: ValDataset, source: str, progress: Callable = tqdm) -> Diagnosis:
    """Open every image and label of a data set.

    Args:
        dataset: with the records, the class table and the root folder.
        source: name of the list for the report.
        progress: wraps the iterable of findings.
    """
    found = Diagnosis(source, dataset.table.labels, images=len(dataset.records))
    found.pixels = np.zeros(len(dataset.table) + 1, np.int64)
    found.in_images = np.zeros(len(dataset.table), np.int64)
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda record: _inspect(dataset, record), dataset.records)
        shown = progress(results, total=len(dataset.records), desc=source, unit="img", disable=None)
        for record, result in zip(dataset.records, shown, strict=True):
            if isinstance(result, str):
                found.problems.append(result)
                continue
            size, counts, notes = result
            for note in notes:
                found.notes[note].append(record["fpath_img"])
            found.sizes[size] += 1
            found.upright += size[1] > size[0]
            found.pixels += counts
            found.in_images += counts[:-1] > 0
    return found


def main() -> int:
    """Check the lists of a configuration."""
    prepare_streams()
    parser = argparse.ArgumentParser(
        "python -m mit_semseg.dataset.doctor", description="Check every image and label of a data set."
    )
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    code = 0
    try:
        data = load_config(args.cfg, args.opts).DATASET
        for source in dict.fromkeys((data.list_train, data.list_val)):
            unusable: list[str] = []
            records = load_records(source, data.root_dataset, unusable)
            found = diagnose(ValDataset(data.root_dataset, records, data), source)
            found.problems[:0] = unusable
            print(found.report())
            code = max(code, 1 if found.problems else 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("every file can be used" if code == 0 else "some files cannot be used, see UNUSABLE above")
    return code


if __name__ == "__main__":
    sys.exit(main())
