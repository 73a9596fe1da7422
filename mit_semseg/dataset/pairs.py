"""Reading the picture and the label of a record, and what becomes of those that cannot be used."""

import copy
import logging
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .classes import UNKNOWN, ClassTable, class_table
from .image_io import ImageFileError, ImageLimits, read_image, read_label
from .layouts import ListError
from .records import load_records
from .transforms import scale_pyramid

logger = logging.getLogger(__name__)


def class_table_of(opt) -> ClassTable:
    """Class table that the options name; objects without `num_class` mean ADE20K."""
    return class_table(getattr(opt, "classes", ""), getattr(opt, "num_class", 150), getattr(opt, "ignore_values", ()))


# What is raised about a record that cannot be used.
UNUSABLE = (ImageFileError, ListError)


class Records(Dataset):
    """What the data sets share: records, options, and reading a picture.

    Attributes:
        records: of the list.
        skipped: sentences about what the list has beside them, where the options skip what cannot be used.
        skip: whether they do.
    """

    def __init__(self, root: str | os.PathLike, odgt, opt):
        self.root_dataset = root
        self.skip = getattr(opt, "on_error", "stop") == "skip"
        self.skipped: list[str] = []
        self.records = load_records(odgt, root, self.skipped if self.skip else None)
        self.limits = ImageLimits(
            pixels=getattr(opt, "max_pixels", ImageLimits.pixels), bytes=getattr(opt, "max_bytes", ImageLimits.bytes)
        )
        sizes = opt.imgSizes
        self.img_sizes = tuple(sizes) if isinstance(sizes, (list, tuple)) else (int(sizes),)
        self.img_max_size = opt.imgMaxSize
        self.padding_constant = opt.padding_constant
        self.normalization = getattr(opt, "normalization", "imagenet")
        self.fast = getattr(opt, "eval_resize", "pixel-exact") == "fast"
        self.as_bytes = False

    @property
    def num_sample(self) -> int:
        """Number of records."""
        return len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def as_uint8(self):
        """The same data set, which leaves normalizing to `images_to_device`: a quarter of the bytes travel.

        `img_data` is then uint8, `normalization` says what is to be done, `img_ori` is a tensor.
        """
        raw = copy.copy(self)
        raw.as_bytes = True
        return raw

    def path(self, record: dict, key: str) -> Path:
        """Path of a record's image (`fpath_img`) or label (`fpath_segm`) on disk."""
        if key not in record:
            raise ListError(f"the record of {record.get('fpath_img')} has no {key}")
        return Path(self.root_dataset, record[key])

    def views(self, image: Image.Image) -> dict:
        """The picture itself, and at every size of evaluation."""
        sizes = self.img_sizes, self.img_max_size, self.padding_constant
        scales = scale_pyramid(image, *sizes, None if self.as_bytes else self.normalization, fast=self.fast)
        original = np.array(image)
        if not self.as_bytes:
            return {"img_ori": original, "img_data": scales}
        return {"img_ori": torch.from_numpy(original), "img_data": scales, "normalization": self.normalization}


class LabelledRecords(Records):
    """Records of which each has a label."""

    def __init__(self, root, odgt, opt):
        super().__init__(root, odgt, opt)
        self.table = class_table_of(opt)
        self.palette = getattr(opt, "palette_labels", False)
        # In shared memory: of all loader workers, one logs.
        self._orientation_logged = torch.zeros((), dtype=torch.bool).share_memory_()

    def pair(self, record: dict) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and raw label (see `read_label`) of a record, of equal size, every value in the class table.

        Both have their EXIF orientation applied. A pair whose orientations differ is logged, once per data set.

        Raises:
            ImageFileError: anything else; names the file and what to do.
            ListError: the record has no label.
        """
        path = self.path(record, "fpath_segm")
        image = read_image(self.path(record, "fpath_img"), limits=self.limits)
        label = read_label(path, palette=self.palette, limits=self.limits)
        check_label(image.size, label, path, self.table.of_file(path))
        if (difference := orientation_mismatch(image, label)) and not self._orientation_logged:
            self._orientation_logged.fill_(True)
            logger.warning(
                "%s: %s; further ones are not logged, python -m mit_semseg.dataset.doctor lists them all",
                record["fpath_img"],
                difference,
            )
        return image, label

    def encode(self, label: Image.Image, record: dict) -> np.ndarray:
        """Class indices (H, W) int64 of a record's raw label, -1 where ignored."""
        return self.table.of_file(record["fpath_segm"]).encode(np.asarray(label))


def orientation_mismatch(image: Image.Image, label: Image.Image) -> str:
    """What differs between the orientations that were applied to an image and its label; empty if nothing does."""
    own, other = image.info["orientation"], label.info["orientation"]
    return f"EXIF orientation {own} of the image, {other} of its label" if own != other else ""


def check_label(image_size: tuple[int, int], label: Image.Image, path: Path, table: ClassTable) -> None:
    """Check a raw label against its picture's (width, height) and the class table.

    Raises:
        ImageFileError: another size, or values the table does not have.
    """
    if image_size != label.size:
        raise ImageFileError(
            f"{path}: the label is {label.width}x{label.height}, its image "
            f"{image_size[0]}x{image_size[1]} (orientations applied); both must have the same size"
        )
    present = np.flatnonzero(label.histogram()) if label.mode == "L" else np.unique(label)
    unknown = present[table.index[present] == UNKNOWN]
    if len(unknown):
        raise ImageFileError(
            f"{path}: label values {', '.join(map(str, unknown[:8]))}{' ...' if len(unknown) > 8 else ''} are not in "
            f"the class table ({table.raw_values()}); correct the file, or add them to DATASET.classes (a row without "
            f"a name in a CSV file ignores a value, and so does DATASET.ignore_values beside a list of names)"
        )
