"""Datasets: training batches, and images at every scale of evaluation."""

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..lib.utils import progress_bar, shorten_list
from .augment import Augmentation
from .classes import UNKNOWN, class_table_from_options
from .image_io import ImageFileError, image_size, orientation_mismatch, read_image, read_label
from .layouts import ListError
from .records import load_records
from .samplers import OrientationBatches, shards
from .transforms import imresize, imresize_fast, normalize, pad_batch, round_up, scale_for, to_uint8_tensor

logger = logging.getLogger(__name__)

TRAIN_LENGTH = int(1e10)  # length of the endless training set
MAX_REPLACEMENTS = 100  # unusable images in a row, with DATASET.on_error skip


class ImageListDataset(Dataset):
    """Base class: a list of images and the options to read them. Subclasses implement `load(record)`.

    Args:
        root_dataset: folder that the paths in the list are relative to.
        odgt: list of images, see `load_records`.
        opt: object with imgSizes, imgMaxSize, padding_constant, and optionally the other DATASET options.
        max_sample, start_idx, end_idx: use the first `max_sample` records, then this slice; -1 sets no limit.

    `records` has the entries of the list, and `skipped` a sentence for every line that DATASET.on_error skip ignored.
    """

    def __init__(
        self, root_dataset: str | os.PathLike, odgt, opt, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1
    ):
        self.root_dataset = root_dataset
        self.skip = getattr(opt, "on_error", "stop") == "skip"
        self.skipped: list[str] = []
        records = load_records(odgt, root_dataset, self.skipped if self.skip else None)
        records = records[:max_sample] if max_sample > 0 else records
        self.records = records[max(start_idx, 0) : end_idx if end_idx >= 0 else None]
        self.img_sizes = tuple(opt.imgSizes) if isinstance(opt.imgSizes, (list, tuple)) else (int(opt.imgSizes),)
        self.img_max_size, self.padding_constant = opt.imgMaxSize, opt.padding_constant
        self.normalization = getattr(opt, "normalization", "imagenet")
        self.fast_resize = getattr(opt, "eval_resize", "pixel-exact") == "fast"
        self.uint8 = False

    @property
    def num_sample(self) -> int:
        return len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """Return `load(record)` and `info`, the path. With `skip`, an unusable record has `info` and `error` only."""
        record = self.records[index]
        try:
            return {**self.load(record), "info": record["fpath_img"]}
        except (ImageFileError, ListError) as error:
            if not self.skip:
                raise
            return {"info": record["fpath_img"], "error": str(error)}

    def _copy(self, **attributes):
        dataset = copy.copy(self)
        vars(dataset).update(attributes)
        return dataset

    def as_uint8(self):
        """Return a copy whose `img_data` is uint8, a quarter of the bytes; `images_to_device` normalizes it."""
        return self._copy(uint8=True)

    def with_skipping(self):
        """Return a copy that skips unusable images, as with DATASET.on_error skip."""
        return self._copy(skip=True)

    def shard(self, index: int, count: int):
        """Return a copy with shard `index` of `count` contiguous shards of the records."""
        positions = shards(len(self.records), count)[index]
        records = self.records[positions.start : positions.stop]
        return self._copy(records=records, skipped=self.skipped if index == 0 else [])

    def subsample(self, count: int):
        """Return a copy with at most `count` records, evenly spaced because neighbors are often similar."""
        count = min(count, len(self.records))
        return self._copy(records=[self.records[i * len(self.records) // count] for i in range(count)])

    def path(self, record: dict, key: str) -> Path:
        """Return the path of `fpath_img` or `fpath_segm` of a record."""
        if key not in record:
            raise ListError(f"the record of {record.get('fpath_img')} has no {key}")
        return Path(self.root_dataset, record[key])

    def multi_scale(self, image: Image.Image) -> dict:
        """Resize an RGB image to every scale of evaluation, with sides rounded up to a multiple of padding_constant.

        Return `img_ori` (H, W, 3) uint8 and `img_data`, a list of (1, 3, h, w) float32. With `as_uint8`, both are uint8
        tensors, and `normalization` is for `images_to_device`.
        """
        scales = []
        for short_side in self.img_sizes:
            scale = scale_for(*image.size, short_side, self.img_max_size)
            size = tuple(round_up(max(1, int(side * scale)), self.padding_constant) for side in image.size)
            scales.append(self._to_tensor(self._resize(image, size)).unsqueeze(0))
        original = np.array(image)
        if not self.uint8:
            return {"img_ori": original, "img_data": scales}
        return {"img_ori": torch.from_numpy(original), "img_data": scales, "normalization": self.normalization}

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return (imresize_fast if self.fast_resize else imresize)(image, size)

    def _to_tensor(self, image: Image.Image) -> torch.Tensor:
        return to_uint8_tensor(image) if self.uint8 else normalize(image, self.normalization)


class LabelledDataset(ImageListDataset):
    """Base class: a list of images with labels, for arguments see `ImageListDataset`."""

    def __init__(self, root_dataset: str | os.PathLike, odgt, opt, *args, **kwargs):
        super().__init__(root_dataset, odgt, opt, *args, **kwargs)
        self.table = class_table_from_options(opt)
        self.palette = getattr(opt, "palette_labels", False)
        # In shared memory, so that only one of all workers logs a warning.
        self._orientation_logged = torch.zeros((), dtype=torch.bool).share_memory_()

    def load_pair(self, record: dict) -> tuple[Image.Image, Image.Image]:
        """Load an image (RGB) and its raw label (mode L or I;16) of the same size, EXIF orientations applied.

        Raise ImageFileError if a file cannot be used, the sizes differ, or the label has values outside the class
        table; ListError if the record has no label. Different orientations of the two are logged once per dataset.
        """
        label_path = self.path(record, "fpath_segm")
        image = read_image(self.path(record, "fpath_img"))
        label = read_label(label_path, palette=self.palette)
        if image.size != label.size:
            sizes = f"{label.width}x{label.height}, but its image {image.width}x{image.height}"
            raise ImageFileError(f"{label_path}: the label has size {sizes}; they must be equal")
        table = self.table.for_file(label_path)
        present = np.flatnonzero(label.histogram()) if label.mode == "L" else np.unique(label)
        if len(unknown := present[table.index[present] == UNKNOWN]):
            values, known = shorten_list([str(value) for value in unknown], 8), table.describe_raw_values()
            raise ImageFileError(
                f"{label_path}: label values {values} are not in the class table ({known}); correct the label or add "
                f"the values to DATASET.classes, without a name to ignore them (in a list: DATASET.ignore_values)"
            )
        if (mismatch := orientation_mismatch(image, label)) and not self._orientation_logged:
            self._orientation_logged.fill_(True)
            message = "%s: %s; further images are not logged, list them with python -m mit_semseg.dataset.doctor"
            logger.warning(message, record["fpath_img"], mismatch)
        return image, label

    def encode_label(self, raw: np.ndarray, record: dict) -> np.ndarray:
        """Convert raw label values (H, W) of a record to class indices int64, -1 where ignored."""
        return self.table.for_file(record["fpath_segm"]).encode(raw)


class TrainDataset(LabelledDataset):
    """Training batches. One element is the batch of one device; element `i` depends on `seed` and `i` alone.

    Args:
        root_dataset, odgt, opt: see `ImageListDataset`; `opt` also needs segm_downsampling_rate, which must divide
            padding_constant.
        side_step: height and width of a batch are rounded up to a multiple of this and of padding_constant.
    """

    def __init__(self, root_dataset, odgt, opt, batch_per_gpu: int = 1, *, side_step: int = 1, seed: int = 304):
        super().__init__(root_dataset, odgt, opt)
        self.fast_resize = getattr(opt, "train_resize", "pixel-exact") == "fast"
        self.segm_downsampling_rate = opt.segm_downsampling_rate
        pad, rate = self.padding_constant, self.segm_downsampling_rate
        if pad % rate:
            raise ValueError(f"padding_constant {pad} must be a multiple of segm_downsampling_rate {rate}")
        self.side_multiple = math.lcm(self.padding_constant, side_step)
        self.random_flip = getattr(opt, "random_flip", True)
        self.augmentation = Augmentation.from_options(opt)
        self.batch_per_gpu, self.seed = batch_per_gpu, seed
        bar = progress_bar(self.records, desc="reading image sizes", unit="img", leave=False)
        self.order = OrientationBatches([self._is_upright(record) for record in bar], batch_per_gpu, seed)

    def _is_upright(self, record: dict) -> bool:
        if self.augmentation.crop:  # crops have one size, so orientations can be mixed
            return False
        if record.get("width") and record.get("height"):
            return record["height"] > record["width"]
        try:
            width, height = image_size(self.path(record, "fpath_img"))
        except ImageFileError:
            if not self.skip:
                raise
            return False  # skipped later, when the image is loaded
        return height > width

    def __len__(self) -> int:
        return TRAIN_LENGTH

    def __getitem__(self, index: int) -> dict:
        """Return batch `index`, see `load_batch`."""
        rng = np.random.default_rng((self.seed, 1, index))
        short_side = int(rng.choice(self.img_sizes))
        flips = rng.random(self.batch_per_gpu) < 0.5 if self.random_flip else [False] * self.batch_per_gpu
        return self.load_batch([self.records[i] for i in self.order[index]], short_side, flips, rng)

    def load_batch(
        self, records: Sequence[dict], short_side: int, flips: Sequence[bool], rng: np.random.Generator | None = None
    ) -> dict:
        """Load N records with the given short side (not used with `random_scale`) and flips.

        Returns:
            `img_data` (N, 3, H, W) float32, `seg_label` (N, h, w) int64 with -1 ignored, `info` with the N paths. If
            `as_uint8`, `img_data` is uint8, and `sizes`, the N (height, width), and `normalization` are added. With
            `skip`, `skipped` has a sentence for every unusable record; other records replace them.
        """
        rng = rng or np.random.default_rng(self.seed)
        images, labels, paths, skipped = [], [], [], []
        for wanted, flip in zip(records, flips, strict=True):
            record, image, label = self._load_usable_pair(wanted, rng, skipped)
            if self.augmentation.scale:
                scale = rng.uniform(*self.augmentation.scale)
            else:
                scale = scale_for(*image.size, short_side, self.img_max_size)
            if flip:
                image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
            size = tuple(max(1, int(side * scale)) for side in image.size)
            image, label = self._resize(image, size), imresize(label, size, "nearest")
            encode = self.table.for_file(record["fpath_segm"]).encode
            image, classes = self.augmentation(image, np.asarray(label), encode, rng)
            images.append(self._to_tensor(image))
            labels.append(classes)
            paths.append(record["fpath_img"])
        batch = pad_batch(images, labels, self.side_multiple, self.segm_downsampling_rate, self.augmentation.crop)
        batch["info"] = paths
        if self.skip:
            batch["skipped"] = skipped
        if self.uint8:
            batch |= {"sizes": [tuple(x.shape[1:]) for x in images], "normalization": self.normalization}
        return batch

    def _load_usable_pair(self, wanted: dict, rng: np.random.Generator, skipped: list[str]) -> tuple:
        """Load a record, or with `skip` its first usable replacement. Return record, image and raw label."""
        for record in self._candidates(wanted, rng):
            try:
                return record, *self.load_pair(record)
            except (ImageFileError, ListError) as error:
                if not self.skip:
                    raise
                skipped.append(str(error))
        raise ImageFileError(f"DATASET.on_error skip: {len(skipped)} unusable images in a row; the last: {skipped[-1]}")

    def _candidates(self, wanted: dict, rng: np.random.Generator) -> Iterator[dict]:
        """Yield a record, then random replacements: first records of its orientation, then all others."""
        yield wanted
        same = self.order.upright == self._is_upright(wanted)
        child = rng.spawn(1)[0]  # leaves the other random numbers unchanged
        for mask in (same, ~same):
            for index in child.permutation(np.flatnonzero(mask))[:MAX_REPLACEMENTS]:
                if self.records[index] is not wanted:
                    yield self.records[index]


class ValDataset(LabelledDataset):
    """Labelled images at every scale of evaluation, for arguments see `ImageListDataset`."""

    def load(self, record: dict) -> dict:
        """Load an item: `multi_scale` of the image, and `seg_label` (1, H, W) int64 with -1 ignored."""
        image, label = self.load_pair(record)
        classes = torch.from_numpy(self.encode_label(np.asarray(label), record))
        return {**self.multi_scale(image), "seg_label": classes.unsqueeze(0)}


class TestDataset(ImageListDataset):
    """Images without labels at every scale of evaluation, for arguments see `ImageListDataset`."""

    __test__ = False  # not a pytest class

    def __init__(self, odgt, opt, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1):
        super().__init__("", odgt, opt, max_sample, start_idx, end_idx)

    def load(self, record: dict) -> dict:
        """Load an item: `multi_scale` of the image."""
        return self.multi_scale(read_image(record["fpath_img"]))
