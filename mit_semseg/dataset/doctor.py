"""Check every image and label of a dataset.

    python -m mit_semseg.dataset.doctor --cfg config/NAME.yaml [KEY VALUE ...]

Prints image sizes, orientations, the fraction of pixels per class, unusable files and list lines, and unusual
properties of usable files. Exit codes: 0 if all files can be used, 1 if some cannot, 2 if an option or list is invalid.
"""

import argparse
import re
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..config import Config, add_config_arguments, load_config
from ..lib.utils import UserError, prepare_streams, progress_bar, shorten_list
from .classes import IGNORE, ClassTable
from .datasets import LabelledDataset
from .image_io import orientation_mismatch, unusual_properties
from .records import load_records, sequences_of, split_records

THUMBNAIL = 16  # width and height of thumbnails
SIMILAR = 0.5  # neighboring frames: maximum difference of thumbnails, as a fraction of the typical difference
MAX_COMPARED = 500  # maximum number of training images from which a typical difference is computed
MIN_SIMILAR = 5  # minimum number of similar pairs for a warning
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
    thumbnails: dict[str, np.ndarray] = field(default_factory=dict)  # image path -> (THUMBNAIL, THUMBNAIL) gray values

    def __post_init__(self):
        self.pixels = np.zeros(len(self.table) + 1, np.int64)  # number of pixels per class, then ignored pixels
        self.channels: list[np.ndarray] = []  # of every image: mean and mean square of every channel, (2, C)
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
        if self.channels:
            mean, square = np.mean(self.channels, axis=0)
            std = np.sqrt(np.maximum(square - mean**2, 0))
            yield f"  mean of every channel: [{', '.join(f'{x:.5g}' for x in mean)}] (DATASET.mean)"
            yield f"  standard deviation: [{', '.join(f'{x:.5g}' for x in std)}] (DATASET.std)"
        names = (*self.table.labels, "(ignored)")
        values = [shorten_list(self.table.label_values(i), 3) for i in (*range(len(self.table)), IGNORE)]
        column, width = max(map(len, names)), max(len("label"), *map(len, values))
        yield f"  {'class':<{column}}  {'label':<{width}}       pixels  images"
        for i in (*np.argsort(-self.pixels[:-1], kind="stable"), -1):
            if self.pixels[i]:
                percent = 100 * self.pixels[i] / self.pixels.sum()
                number = self.images_per_class[i]
                yield f"  {names[i]:<{column}}  {values[i]:<{width}}  {percent:>9.3f} %  {number:>6}"
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


class _Inspection(NamedTuple):
    """Properties of an image and its label."""

    size: tuple[int, int]  # (width, height)
    pixels: np.ndarray  # number of pixels per class, then ignored pixels
    notes: list[str]  # unusual properties
    thumbnail: np.ndarray  # see `DatasetReport`
    channels: np.ndarray | None  # mean and mean square of every channel, (2, C), if DATASET.mean is set


def _inspect_record(dataset: LabelledDataset, record: dict) -> _Inspection | UserError:
    """Return the properties of a record, or the error of an unusable record."""
    try:
        image, label, table = dataset.load_pair(record)
    except UserError as error:
        return error
    size = record.get("width", image.size[0]), record.get("height", image.size[1])
    if size != image.size:
        return UserError(f"{record['fpath_img']}: the list has size {size}, the file {image.size}; correct the list")
    notes = [] if dataset.bands else unusual_properties(dataset.path(record, "fpath_img"))
    if mismatch := orientation_mismatch(image, label):
        notes.append(mismatch)
    if any(Path(record[key]).is_absolute() or ".." in Path(record[key]).parts for key in ("fpath_img", "fpath_segm")):
        notes.append("path outside DATASET.root_dataset")
    classes, count = table.encode(np.asarray(label)), len(table)
    pixels = np.bincount(np.where(classes == IGNORE, count, classes).ravel(), minlength=count + 1)
    thumbnail = dataset.to_rgb(image).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    channels = None
    if dataset.bands:
        finite = np.isfinite(image.pixels)
        values = np.where(finite, image.pixels, 0).astype(np.float64)
        counts = np.maximum(finite.sum((0, 1)), 1)
        channels = np.stack([values.sum((0, 1)) / counts, (values**2).sum((0, 1)) / counts])
    return _Inspection(image.size, pixels, notes, np.asarray(thumbnail, np.float32), channels)


def inspect_dataset(dataset: LabelledDataset, source: str) -> DatasetReport:
    """Load and check every image and label of a dataset. The report shows `source` as the name of the list."""
    report, records = DatasetReport(source, dataset.table, len(dataset.records)), dataset.records
    with ThreadPoolExecutor() as pool:
        results = pool.map(partial(_inspect_record, dataset), records)
        bar = progress_bar(results, total=len(records), desc=source, unit="img")
        for record, result in zip(records, bar, strict=True):
            if isinstance(result, UserError):
                report.problems.append(str(result))
                continue
            report.sizes[result.size] += 1
            report.pixels += result.pixels
            report.images_per_class += result.pixels > 0
            report.thumbnails[record["fpath_img"]] = result.thumbnail
            if result.channels is not None:
                report.channels.append(result.channels)
            for note in result.notes:
                report.notes[note].append(record["fpath_img"])
    return report


def sequence_warning(training: Mapping[str, np.ndarray], validation: Mapping[str, np.ndarray]) -> str:
    """Return a warning if validation images look like frames between training images of the same video, else ''.

    A validation image is compared with the training image that has the nearest number in its name and with the median
    of the other training images. The arguments map image paths to thumbnails.
    """
    if not training or not validation:
        return ""
    sequences: dict[str, list[tuple[int, str]]] = defaultdict(list)
    found = dict(zip((*training, *validation), sequences_of([*training, *validation]), strict=True))
    for path in training:
        name, number = found[path]
        sequences[Path(name).name].append((number, path))
    for frames in sequences.values():
        frames.sort()
    step = -(-len(training) // MAX_COMPARED)
    similar, compared, thumbnails = [], 0, np.array(list(training.values())[::step])
    for path, thumbnail in validation.items():
        name, number = found[path]
        if frames := sequences.get(Path(name).name):
            position = bisect_left(frames, (number, ""))
            near = frames[max(position - 1, 0) : position + 1]
            neighbor = min(near, key=lambda frame: abs(frame[0] - number))[1]
            typical = np.median(np.abs(thumbnails - thumbnail).mean((1, 2)))
            compared += 1
            if np.abs(training[neighbor] - thumbnail).mean() < SIMILAR * typical:
                similar.append((path, neighbor))
    if len(similar) < max(MIN_SIMILAR, compared / 2, len(validation) / 4):
        return ""
    return (
        f"warning: {len(similar)} of {len(validation)} validation images look like frames next to training images, for "
        f"example {similar[0][0]} and {similar[0][1]}. The validation metrics will be too good. Put whole sequences "
        f"into one list; DATASET.val_fraction with DATASET.val_groups True does that"
    )


def _lists(options: Config) -> Iterator[tuple[str, list[dict], list[str]]]:
    """Yield name, records and problems of the training list and of the validation list."""
    if not options.val_fraction:
        for source in dict.fromkeys((options.list_train, options.list_val)):
            problems: list[str] = []
            yield source, load_records(source, options.root_dataset, problems), problems
        return
    problems = []
    records = load_records(options.list_train, options.root_dataset, problems)
    training, validation = split_records(
        records, options.val_fraction, seed=options.val_seed, groups=options.val_groups
    )
    yield f"{options.list_train} (training)", training, problems
    yield f"{options.list_train} (validation)", validation, []


def main() -> int:
    """Check the training list and the validation list of a configuration. Return the exit code."""
    prepare_streams()
    parser = argparse.ArgumentParser("python -m mit_semseg.dataset.doctor", description="Check all images and labels.")
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    code = 0
    try:
        options = load_config(args.cfg, args.opts).DATASET
        reports = []
        for source, records, problems in _lists(options):
            report = inspect_dataset(LabelledDataset(options.root_dataset, records, options), source)
            report.problems[:0] = problems
            print(report.format())
            code = 1 if report.problems else code
            reports.append(report)
        if len(reports) == 2 and (warning := sequence_warning(*(report.thumbnails for report in reports))):
            print(warning)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("all files can be used" if code == 0 else "some files cannot be used, see UNUSABLE above")
    return code


if __name__ == "__main__":
    sys.exit(main())
