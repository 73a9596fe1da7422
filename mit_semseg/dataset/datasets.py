"""Datasets that return training batches, or images resized to every scale of evaluation."""

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..lib.utils import progress_bar, shorten_list
from .augment import Augmentation, mix_classes
from .bands import BandImage, Bands
from .class_counts import class_counts
from .classes import UNKNOWN, ClassTable, class_table_from_options
from .image_io import ImageFileError, image_size, orientation_mismatch, read_image, read_label
from .layouts import ListError
from .records import load_records, split_records
from .samplers import OrientationBatches, class_probabilities, draw_by_class, shards
from .transforms import imresize, imresize_fast, normalize, pad_batch, round_up, scale_for, to_uint8_tensor

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 100  # maximum number of replacements tried for an unusable image, per orientation


class ImageListDataset(Dataset):
    """Base class for datasets over a list of images. Subclasses implement `load(record)` or override `__getitem__`.

    Args:
        root_dataset: base folder for the paths in the list.
        odgt: list of images, see `load_records`.
        opt: object with imgSizes, imgMaxSize and padding_constant, and optionally other DATASET options.
        max_sample, start_idx, end_idx: use records `start_idx:end_idx` of the first `max_sample`; -1 sets no limit.
        part: with DATASET.val_fraction, 0 selects the training images, and 1 the validation images.

    Attributes:
        records: one `Record` per image.
        skipped: with DATASET.on_error skip, one message per skipped line or file of the list.
    """

    default_part: int | None = None  # `part` if it is not given

    def __init__(
        self,
        root_dataset: str | os.PathLike,
        odgt,
        opt,
        max_sample: int = -1,
        start_idx: int = -1,
        end_idx: int = -1,
        *,
        part: int | None = None,
    ):
        self.root_dataset = root_dataset
        self.skip = getattr(opt, "on_error", "stop") == "skip"
        self.skipped: list[str] = []
        records = load_records(odgt, root_dataset, self.skipped if self.skip else None)
        part = self.default_part if part is None else part
        if part is not None and (fraction := getattr(opt, "val_fraction", 0)):
            records = split_records(records, fraction, seed=opt.val_seed, groups=opt.val_groups)[part]
        records = records[:max_sample] if max_sample > 0 else records
        self.records = records[max(start_idx, 0) : end_idx if end_idx >= 0 else None]
        self.img_sizes = tuple(opt.imgSizes) if isinstance(opt.imgSizes, (list, tuple)) else (int(opt.imgSizes),)
        self.img_max_size, self.padding_constant = opt.imgMaxSize, opt.padding_constant
        self.normalization = getattr(opt, "normalization", "imagenet")
        self.bands = Bands.from_options(opt)
        self.fast_resize = getattr(opt, "eval_resize", "pixel-exact") == "fast"
        self.uint8 = False

    @property
    def num_sample(self) -> int:
        return len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """Return the dict from `load` plus the path `info`. For a skipped image, return only `info` and `error`."""
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
        """Return a copy of this dataset with uint8 `img_data`; `images_to_device` normalizes it on the device.

        Images that are not RGB (DATASET.channels) stay float32.
        """
        return self._copy(uint8=self.bands is None)

    def with_skipping(self):
        """Return a copy of this dataset that skips unusable images, as with DATASET.on_error skip."""
        return self._copy(skip=True)

    def shard(self, index: int, count: int):
        """Split the records into `count` contiguous shards. Return a dataset with the records of shard `index`."""
        positions = shards(len(self.records), count)[index]
        records = self.records[positions.start : positions.stop]
        return self._copy(records=records, skipped=self.skipped if index == 0 else [])

    def subsample(self, count: int):
        """Return a dataset with at most `count` evenly spaced records, because neighbors are often similar."""
        count = min(count, len(self.records))
        return self._copy(records=[self.records[i * len(self.records) // count] for i in range(count)])

    def path(self, record: dict, key: str) -> Path:
        """Return the path of a record's image (`key` fpath_img) or label (`key` fpath_segm)."""
        if key not in record:
            raise ListError(f"the record of {record.get('fpath_img')} has no {key}; add it to the list")
        return Path(self.root_dataset, record[key])

    def read(self, path: str | os.PathLike) -> Image.Image | BandImage:
        """Read an image file, see `read_image` and `Bands.read`."""
        return self.bands.read(path) if self.bands else read_image(path)

    def to_rgb(self, image: Image.Image | BandImage) -> Image.Image:
        """Return the RGB image that shows the result of `read`."""
        return image.preview() if self.bands else image

    def multi_scale(self, image: Image.Image | BandImage) -> dict:
        """Resize an image to every scale of evaluation. Sides are rounded up to multiples of padding_constant.

        Return a dict: `img_ori` is the image (for a BandImage, its preview), an array (H, W, 3) uint8; `img_data` is a
        list of normalized tensors (1, C, h, w), C = 3 for RGB. After `as_uint8`, `img_ori` and the items of `img_data`
        are uint8 tensors, and the dict contains `normalization` for `images_to_device`.
        """
        scales = []
        for short_side in self.img_sizes:
            scale = scale_for(*image.size, short_side, self.img_max_size)
            size = tuple(round_up(max(1, int(side * scale)), self.padding_constant) for side in image.size)
            scales.append(self._to_tensor(self._resize(image, size)).unsqueeze(0))
        original = np.array(self.to_rgb(image))
        if not self.uint8:
            return {"img_ori": original, "img_data": scales}
        return {"img_ori": torch.from_numpy(original), "img_data": scales, "normalization": self.normalization}

    def _resize(self, image: Image.Image | BandImage, size: tuple[int, int]) -> Image.Image | BandImage:
        if self.bands:
            return image.resize(size)
        return (imresize_fast if self.fast_resize else imresize)(image, size)

    def _to_tensor(self, image: Image.Image | BandImage) -> torch.Tensor:
        if self.bands:
            return image.to_tensor()
        return to_uint8_tensor(image) if self.uint8 else normalize(image, self.normalization)


class LabelledDataset(ImageListDataset):
    """Base class for datasets of labelled images. Takes the arguments of `ImageListDataset`."""

    def __init__(self, root_dataset: str | os.PathLike, odgt, opt, *args, **kwargs):
        super().__init__(root_dataset, odgt, opt, *args, **kwargs)
        self.table = class_table_from_options(opt)
        self.segm_downsampling_rate = getattr(opt, "segm_downsampling_rate", 1)
        self.label_format = getattr(opt, "label_format", "gray")
        # A flag in shared memory, so that only one worker logs the warning about orientations.
        self._orientation_logged = torch.zeros((), dtype=torch.bool).share_memory_()

    def load_pair(self, record: dict) -> tuple[Image.Image | BandImage, Image.Image, ClassTable]:
        """Load an image (RGB, or a BandImage), its raw label (mode L or I;16) and the class table of the label.

        EXIF orientations are applied. A warning is logged once per dataset if they differ between image and label.
        Raise ListError if the record has no label, and ImageFileError if a file cannot be used, image and label have
        different sizes, or a label value is not in the class table.
        """
        label_path = self.path(record, "fpath_segm")
        image = self.read(self.path(record, "fpath_img"))
        label, table = self.load_label(record)
        if image.size != label.size:
            (width, height), (label_width, label_height) = image.size, label.size
            sizes = f"{label_width}x{label_height}, but its image has {width}x{height}"
            raise ImageFileError(f"{label_path}: the label has size {sizes}; the sizes must be equal")
        if (mismatch := orientation_mismatch(image, label)) and not self._orientation_logged:
            self._orientation_logged.fill_(True)
            message = "%s: %s; this is logged once. To list all such images, run python -m mit_semseg.dataset.doctor"
            logger.warning(message, record["fpath_img"], mismatch)
        return image, label, table

    def load_label(self, record: dict) -> tuple[Image.Image, ClassTable]:
        """Load a raw label (mode L or I;16) and its class table.

        Raise ListError if the record has no label, and ImageFileError if the file cannot be used or a label value is
        not in the class table.
        """
        label_path = self.path(record, "fpath_segm")
        table = self.table.for_file(label_path)
        label = read_label(label_path, self.label_format, table.values_of_colors if table.color_labels else None)
        present = np.flatnonzero(label.histogram()) if label.mode == "L" else np.unique(label)
        if len(unknown := present[table.index[present] == UNKNOWN]):
            values, known = shorten_list([str(value) for value in unknown], 8), table.describe_raw_values()
            raise ImageFileError(
                f"{label_path}: label values {values} are not in the class table ({known}); correct the label, or add "
                f"the values to DATASET.classes. To ignore them, add rows without names to the class table, or set "
                f"DATASET.ignore_values"
            )
        return label, table


class TrainDataset(LabelledDataset):
    """Endless sequence of training batches for one device. Item `i` depends only on the arguments and `i`.

    Args:
        root_dataset, odgt, opt: see `ImageListDataset`. `opt` also needs segm_downsampling_rate; padding_constant must
            be a multiple of segm_downsampling_rate.
        batch_per_gpu: number of images per batch.
    """

    default_part = 0

    def __init__(self, root_dataset, odgt, opt, batch_per_gpu: int = 1, *, seed: int = 304):
        super().__init__(root_dataset, odgt, opt)
        self.fast_resize = getattr(opt, "train_resize", "pixel-exact") == "fast"
        self.random_flip, self.random_scale = getattr(opt, "random_flip", True), getattr(opt, "random_scale", ())
        self.augmentation, self.class_mix = Augmentation.from_options(opt), getattr(opt, "class_mix", 0)
        self.batch_per_gpu, self.seed = batch_per_gpu, seed
        bar = progress_bar(self.records, desc="reading image sizes", unit="img", leave=False)
        upright = [self._is_upright(record) for record in bar]
        temperature = getattr(opt, "class_sampling", 0)
        draw = None
        if temperature and (counts := class_counts(self)).any():
            draw = partial(draw_by_class, counts > 0, class_probabilities(counts, temperature))
        self.order = OrientationBatches(upright, batch_per_gpu, seed, draw=draw)

    @property
    def has_fixed_shape(self) -> bool:
        """Whether all batches have the same shape, because images are cropped and padded to `crop_size`."""
        return self.augmentation.crop is not None

    def _is_upright(self, record: dict) -> bool:
        if self.has_fixed_shape:  # a batch can mix orientations
            return False
        if record.get("width") and record.get("height"):
            return record["height"] > record["width"]
        with suppress(ImageFileError) if self.skip else nullcontext():
            width, height = (Bands.size if self.bands else image_size)(self.path(record, "fpath_img"))
            return height > width
        return False  # unreadable; `load_batch` will skip the image

    def __len__(self) -> int:
        return int(1e10)  # the training set is endless

    def __getitem__(self, index: int) -> dict:
        """Return batch `index`, a dict as described in `load_batch`."""
        rng = np.random.default_rng((self.seed, 1, index))
        short_side = int(rng.choice(self.img_sizes))
        flips = rng.random(self.batch_per_gpu) < 0.5 if self.random_flip else [False] * self.batch_per_gpu
        return self.load_batch([self.records[i] for i in self.order[index]], short_side, flips, rng)

    def load_batch(
        self, records: Sequence[dict], short_side: int, flips: Sequence[bool], rng: np.random.Generator | None = None
    ) -> dict:
        """Load a batch of N records. `flips` marks records to flip. DATASET.random_scale overrides `short_side`.

        Return a dict: `img_data` (N, C, H, W) float32, C = 3 for RGB, `seg_label` (N, h, w) int64 with -1 for ignored
        pixels, and `info`, a list of N image paths. After `as_uint8`, `img_data` is uint8, and the dict also has
        `normalization` and `sizes`, a list of N (height, width). With DATASET.on_error skip, unusable records are
        replaced, and `skipped` has one message per unusable record.
        """
        rng = rng or np.random.default_rng(self.seed)
        images, labels, paths, skipped = [], [], [], []
        for wanted, flip in zip(records, flips, strict=True):
            record, image, label, table = self._load_usable_pair(wanted, rng, skipped)
            scale = scale_for(*image.size, short_side, self.img_max_size)
            if self.random_scale:
                scale = rng.uniform(*self.random_scale)
            if flip:
                label = ImageOps.mirror(label)
                image = image.flip_left_right() if self.bands else ImageOps.mirror(image)
            size = tuple(max(1, int(side * scale)) for side in image.size)
            image, label = self._resize(image, size), imresize(label, size, "nearest")
            image, classes = self.augmentation(image, np.asarray(label), table.encode, rng)
            images.append(self._to_tensor(image))
            labels.append(classes)
            paths.append(record["fpath_img"])
        if self.class_mix:
            images, labels = mix_classes(images, labels, self.class_mix, rng)
        batch = pad_batch(images, labels, self.padding_constant, self.segm_downsampling_rate, self.augmentation.crop)
        batch["info"] = paths
        if self.skip:
            batch["skipped"] = skipped
        if self.uint8:
            batch |= {"sizes": [tuple(x.shape[1:]) for x in images], "normalization": self.normalization}
        return batch

    def _load_usable_pair(self, wanted: dict, rng: np.random.Generator, skipped: list[str]) -> tuple:
        """Load `wanted`. With `skip`, replace the record if it is unusable. Return (record, image, label, table)."""
        for record in self._candidates(wanted, rng):
            try:
                return record, *self.load_pair(record)
            except (ImageFileError, ListError) as error:
                if not self.skip:
                    raise
                skipped.append(str(error))
        raise ImageFileError(f"DATASET.on_error skip: no image is usable; last of {len(skipped)} errors: {skipped[-1]}")

    def _candidates(self, wanted: dict, rng: np.random.Generator) -> Iterator[dict]:
        """Yield `wanted`, then random replacements. Records with the same orientation precede other records."""
        yield wanted
        same = self.order.upright == self._is_upright(wanted)
        child = rng.spawn(1)[0]  # `spawn` does not change the numbers that `rng` draws later
        for mask in (same, ~same):
            for index in child.permutation(np.flatnonzero(mask))[:MAX_REPLACEMENTS]:
                if self.records[index] is not wanted:
                    yield self.records[index]


class ValDataset(LabelledDataset):
    """Labelled images, resized to every scale of evaluation. Takes the arguments of `ImageListDataset`."""

    default_part = 1

    def load(self, record: dict) -> dict:
        """Return the dict from `multi_scale` plus `seg_label` (1, H, W) int64 with -1 for ignored pixels."""
        image, label, table = self.load_pair(record)
        classes = torch.from_numpy(table.encode(np.asarray(label)))
        return {**self.multi_scale(image), "seg_label": classes.unsqueeze(0)}


class TestDataset(ImageListDataset):
    """Unlabelled images, resized to every scale of evaluation. Takes the arguments of `ImageListDataset`."""

    __test__ = False  # not a pytest class

    def __init__(self, odgt, opt, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1):
        super().__init__("", odgt, opt, max_sample, start_idx, end_idx)

    def load(self, record: dict) -> dict:
        """Read the image and return the dict from `multi_scale`."""
        return self.multi_scale(self.read(record["fpath_img"]))
