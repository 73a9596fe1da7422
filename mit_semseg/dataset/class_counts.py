"""Count the pixels of every class in every label of a dataset."""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..lib.utils import WriteError, atomic_write, cache_dir, progress_bar
from .image_io import ImageFileError
from .layouts import ListError

if TYPE_CHECKING:
    from .datasets import LabelledDataset

logger = logging.getLogger(__name__)


def class_counts(dataset: "LabelledDataset") -> np.ndarray:
    """Return the number of pixels of every class in every label, (records, classes) int64.

    The result is stored in the cache folder, and read from there until a label file or the class table changes. A
    label that the dataset skips (DATASET.on_error skip) has no pixels.

    Raises:
        ImageFileError, ListError: a label is unusable and the dataset does not skip it.
    """
    path = cache_dir() / "class_counts" / f"{_fingerprint(dataset)}.npy"
    if path.is_file():
        return np.load(path)
    logger.info("counting the pixels of every class in %d labels", len(dataset.records))
    with ThreadPoolExecutor() as pool:
        rows = pool.map(partial(_count, dataset), dataset.records)
        bar = progress_bar(rows, total=len(dataset.records), desc="counting classes", unit="img", leave=False)
        counts = np.array(list(bar))
    with suppress(WriteError):  # without the cache, the labels are counted again in the next run
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial_path, open(partial_path, "wb") as out:
            np.save(out, counts)
    return counts


def _count(dataset: "LabelledDataset", record: dict) -> np.ndarray:
    try:
        label, table = dataset.load_label(record)
    except (ImageFileError, ListError):
        if not dataset.skip:
            raise
        return np.zeros(len(dataset.table), np.int64)
    classes = table.encode(np.asarray(label))
    return np.bincount(classes[classes >= 0], minlength=len(table))


def _fingerprint(dataset: "LabelledDataset") -> str:
    """Return a hash of the class table and of path, size and modification time of every label file."""
    digest = hashlib.sha256()
    for table in (dataset.table, *dataset.table.variants.values()):
        digest.update(table.index.tobytes() + repr(sorted(table.raw_of_color.items())).encode())
    for record in dataset.records:
        path = Path(dataset.root_dataset, record.get("fpath_segm", "")).absolute()
        stat = path.stat() if path.is_file() else None
        digest.update(repr((str(path), stat and (stat.st_size, stat.st_mtime_ns), dataset.label_format)).encode())
    return digest.hexdigest()[:32]
