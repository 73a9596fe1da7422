"""Data sets: from records to training batches, and to pictures at every scale of evaluation."""

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..lib.nn.scatter import copy_to_device
from .augment import Augmentation
from .classes import UNKNOWN, ClassTable, class_table
from .files import ImageFileError, image_size, read_image, read_label
from .layouts import ListError
from .records import load_records
from .samplers import OrientationBatches, shards
from .transforms import as_bytes, normalize, normalized, pad_batch, scale_for, scale_pyramid, train_pair

ENDLESS = int(1e10)  # length of the training set: a plain DataLoader over it never ends


def table_of(opt) -> ClassTable:
    """Class table that the options name; objects without `num_class` mean ADE20K."""
    return class_table(getattr(opt, "classes", ""), getattr(opt, "num_class", 150), getattr(opt, "ignore_values", ()))


def augmentation_of(opt) -> Augmentation:
    """What the options vary; objects without them vary nothing."""
    crop, scale = getattr(opt, "crop_size", 0), getattr(opt, "random_scale", ())
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    return Augmentation(
        scale=tuple(scale) or None,
        crop=crop if all(crop) else None,
        max_ratio=getattr(opt, "cat_max_ratio", 1.0),
        jitter=getattr(opt, "color_jitter", 0.0),
        blur=getattr(opt, "blur", 0.0),
    )


class _Records(Dataset):
    """What the data sets share: records, options, and reading an (image, label) pair."""

    def __init__(self, root: str | os.PathLike, odgt, opt):
        self.root_dataset = root
        self.records = load_records(odgt, root)
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

    def of_bytes(self):
        """The same data set, which leaves normalizing to `float_pictures`: a quarter of the bytes travel.

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


class _LabelledRecords(_Records):
    def __init__(self, root, odgt, opt):
        super().__init__(root, odgt, opt)
        self.table = table_of(opt)
        self.palette = getattr(opt, "palette_labels", False)

    def pair(self, record: dict) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and raw label (mode L) of a record, of equal size, every value in the class table.

        Raises:
            ImageFileError: anything else; names the file and what to do.
        """
        path = self.path(record, "fpath_segm")
        image, label = read_image(self.path(record, "fpath_img")), read_label(path, palette=self.palette)
        check_label(image.size, label, path, self.table.of_file(path))
        return image, label

    def encode(self, label: Image.Image, record: dict) -> np.ndarray:
        """Class indices (H, W) int64 of a record's raw label, -1 where ignored."""
        return self.table.of_file(record["fpath_segm"]).encode(np.asarray(label))


def check_label(image_size: tuple[int, int], label: Image.Image, path: Path, table: ClassTable) -> None:
    """Check a raw label (mode L) against its picture's (width, height) and the class table.

    Raises:
        ImageFileError: another size, or values the table does not have.
    """
    if image_size != label.size:
        raise ImageFileError(
            f"{path}: the label is {label.width}x{label.height}, its image (as its EXIF turns it) "
            f"{image_size[0]}x{image_size[1]}; both must have the same size"
        )
    present = np.flatnonzero(label.histogram())
    unknown = present[table.index[present] == UNKNOWN]
    if len(unknown):
        raise ImageFileError(
            f"{path}: label values {', '.join(map(str, unknown[:8]))}{' ...' if len(unknown) > 8 else ''} are not in "
            f"the class table ({table.raw_values()}); correct the file, or add them to DATASET.classes (a row without "
            f"a name in a CSV file ignores a value, and so does DATASET.ignore_values beside a list of names)"
        )


class TrainDataset(_LabelledRecords):
    """Training batches; one element is the whole batch of one device.

    Args:
        root_dataset: folder that the paths in the list are relative to.
        odgt: list of images, see `load_records`.
        opt: object with imgSizes, imgMaxSize, padding_constant, segm_downsampling_rate, and optionally random_flip,
            random_scale, crop_size, cat_max_ratio, color_jitter, blur, normalization, train_resize, classes,
            num_class, ignore_values, palette_labels (as the options of the same name).
        batch_per_gpu: images per batch.
        side_step: the sides of a batch are rounded up to a multiple of this, beside padding_constant.
        seed: of order, sizes and flips. Element `i` depends on the seed and `i` alone.

    Raises:
        ListError, ClassTableError: the list or class table cannot be used.
        ValueError: the downsampling rate does not divide the padding.
    """

    def __init__(self, root_dataset, odgt, opt, batch_per_gpu: int = 1, *, side_step: int = 1, seed: int = 304):
        super().__init__(root_dataset, odgt, opt)
        self.fast = getattr(opt, "train_resize", "pixel-exact") == "fast"
        self.segm_downsampling_rate = opt.segm_downsampling_rate
        if self.padding_constant % self.segm_downsampling_rate:
            raise ValueError(
                f"padding_constant {self.padding_constant} is no multiple of segm_downsampling_rate "
                f"{self.segm_downsampling_rate}"
            )
        self.side_multiple = math.lcm(self.padding_constant, side_step)
        self.random_flip = getattr(opt, "random_flip", True)
        self.augmentation = augmentation_of(opt)
        self.batch_per_gpu, self.seed = batch_per_gpu, seed
        # Crops are of one size, so any picture goes with any other.
        upright = [not self.augmentation.crop and self._is_upright(record) for record in self.records]
        self.order = OrientationBatches(upright, batch_per_gpu, seed)

    def _is_upright(self, record: dict) -> bool:
        if record.get("width") and record.get("height"):
            return record["height"] > record["width"]
        width, height = image_size(self.path(record, "fpath_img"))
        return height > width

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict:
        """Batch `index`: see `load_batch`."""
        rng = np.random.default_rng((self.seed, 1, index))
        short_side = int(rng.choice(self.img_sizes))
        flips = rng.random(self.batch_per_gpu) < 0.5 if self.random_flip else [False] * self.batch_per_gpu
        return self.load_batch([self.records[i] for i in self.order[index]], short_side, flips, rng)

    def load_batch(
        self,
        records: Sequence[dict],
        short_side: int,
        flips: Sequence[bool],
        rng: np.random.Generator | None = None,
    ) -> dict:
        """A batch of given records, scale and flips.

        Args:
            short_side: of the pictures, unless their scale is drawn.
            rng: of all other draws; seeded with the data set's seed by default.

        Returns:
            `img_data` (N, 3, H, W) float32, `seg_label` (N, h, w) int64 with -1 ignored, `info` the N paths; `of_bytes`
            also `sizes`, (height, width) of the N pictures.
        """
        rng, images, labels = rng or np.random.default_rng(self.seed), [], []
        vary = self.augmentation
        for record, flip in zip(records, flips, strict=True):
            image, label = self.pair(record)
            scale = rng.uniform(*vary.scale) if vary.scale else scale_for(*image.size, short_side, self.img_max_size)
            image, label = train_pair(image, label, scale=scale, flip=bool(flip), fast=self.fast)
            image, indices = vary(image, self.encode(label, record), rng)
            images.append(as_bytes(image) if self.as_bytes else normalize(image, self.normalization))
            labels.append(indices)
        batch = pad_batch(images, labels, self.side_multiple, self.segm_downsampling_rate, vary.crop)
        batch["info"] = [record["fpath_img"] for record in records]
        if self.as_bytes:
            batch |= {"sizes": [tuple(x.shape[1:]) for x in images], "normalization": self.normalization}
        return batch


def float_pictures(batch: dict, device: torch.device | str) -> Tensor | list[Tensor]:
    """The pictures (N, 3, H, W) of a batch, or an item's at every scale, on a device, normalized if they are bytes."""
    x, how = copy_to_device(batch["img_data"], torch.device(device)), batch.get("normalization")
    if how is None:
        return x
    return [normalized(scale, how) for scale in x] if isinstance(x, list) else normalized(x, how, batch["sizes"])


def _subset(records: list[dict], max_sample: int, start_idx: int, end_idx: int) -> list[dict]:
    records = records[:max_sample] if max_sample > 0 else records
    return records[max(start_idx, 0) : end_idx if end_idx >= 0 else None]


class _Divisible(_Records):
    def part(self, number: int, parts: int):
        """The same data set with one of `parts` contiguous shares of the records, which differ by one at most."""
        share = shards(len(self.records), parts)[number]
        part = copy.copy(self)
        part.records = self.records[share.start : share.stop]
        return part

    def spread(self, count: int):
        """The same data set with at most so many of the records, evenly spaced: neighbours are often alike."""
        part, there = copy.copy(self), len(self.records)
        count = min(count, there)
        part.records = [self.records[i * there // count] for i in range(count)]
        return part


class ValDataset(_Divisible, _LabelledRecords):
    """Labelled pictures at every scale of evaluation.

    Args:
        root_dataset, odgt, opt: as for `TrainDataset`, without segm_downsampling_rate and random_flip.
        max_sample: take the first so many records; -1 all.
        start_idx, end_idx: then take this slice; -1 all.
    """

    def __init__(self, root_dataset, odgt, opt, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1):
        super().__init__(root_dataset, odgt, opt)
        self.records = _subset(self.records, max_sample, start_idx, end_idx)

    def __getitem__(self, index: int) -> dict:
        """`img_ori` (H, W, 3) uint8, `img_data` list of (1, 3, h, w), `seg_label` (1, H, W) int64, `info` the path."""
        record = self.records[index]
        image, label = self.pair(record)
        return {
            **self.views(image),
            "seg_label": torch.from_numpy(self.encode(label, record)).unsqueeze(0),
            "info": record["fpath_img"],
        }


class TestDataset(_Divisible):
    """Pictures without labels at every scale.

    Args:
        odgt: list of images, or records such as `[{"fpath_img": path}]`.
        opt: object with imgSizes, imgMaxSize, padding_constant.
        max_sample: take the first so many records; -1 all.
        start_idx, end_idx: then take this slice; -1 all.
    """

    __test__ = False  # no test class, whatever its name says to pytest

    def __init__(self, odgt, opt, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1):
        super().__init__("", odgt, opt)
        self.records = _subset(self.records, max_sample, start_idx, end_idx)

    def __getitem__(self, index: int) -> dict:
        """`img_ori` (H, W, 3) uint8, `img_data` list of (1, 3, h, w), `info` the path."""
        record = self.records[index]
        image = read_image(record["fpath_img"])
        return {**self.views(image), "info": record["fpath_img"]}
