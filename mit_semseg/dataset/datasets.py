"""Data sets: from records to training batches, and to pictures at every scale of evaluation."""

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..lib.nn.scatter import copy_to_device
from .augment import Augmentation
from .image_io import ImageFileError, image_size, read_image
from .pairs import UNUSABLE, LabelledRecords, Records
from .samplers import OrientationBatches, shards
from .transforms import as_bytes, normalize, normalized, pad_batch, scale_for, train_pair

ENDLESS = int(1e10)  # length of the training set: a plain DataLoader over it never ends
MOST_TRIES = 100  # unusable records one after the other, with DATASET.on_error skip


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


class TrainDataset(LabelledRecords):
    """Training batches; one element is the whole batch of one device.

    Args:
        root_dataset: folder that the paths in the list are relative to.
        odgt: list of images, see `load_records`.
        opt: object with imgSizes, imgMaxSize, padding_constant, segm_downsampling_rate, and optionally random_flip,
            random_scale, crop_size, cat_max_ratio, color_jitter, blur, normalization, train_resize, classes,
            num_class, ignore_values, palette_labels, on_error, max_pixels, max_bytes (as the options of the same name).
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
        try:
            width, height = image_size(self.path(record, "fpath_img"), limits=self.limits)
        except ImageFileError:
            if not self.skip:
                raise
            return False  # it will be left out when its turn comes
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
            also `sizes`, (height, width) of the N pictures. With `on_error` skip `skipped`, a sentence for every
            record that could not be used, in whose place there is another.
        """
        rng, images, labels = rng or np.random.default_rng(self.seed), [], []
        vary, used, skipped = self.augmentation, [], []
        for wanted, flip in zip(records, flips, strict=True):
            record, image, label = self._usable(wanted, rng, skipped)
            used.append(record["fpath_img"])
            scale = rng.uniform(*vary.scale) if vary.scale else scale_for(*image.size, short_side, self.img_max_size)
            image, label = train_pair(image, label, scale=scale, flip=bool(flip), fast=self.fast)
            image, indices = vary(image, self.encode(label, record), rng)
            images.append(as_bytes(image) if self.as_bytes else normalize(image, self.normalization))
            labels.append(indices)
        batch = pad_batch(images, labels, self.side_multiple, self.segm_downsampling_rate, vary.crop)
        batch |= {"info": used, "skipped": skipped} if self.skip else {"info": used}
        if self.as_bytes:
            batch |= {"sizes": [tuple(x.shape[1:]) for x in images], "normalization": self.normalization}
        return batch

    def _usable(
        self, wanted: dict, rng: np.random.Generator, skipped: list[str]
    ) -> tuple[dict, Image.Image, Image.Image]:
        """The first record that can be used, of the one wanted and those in its place, with its picture and label."""
        for record in self._in_order(wanted, rng):
            try:
                return record, *self.pair(record)
            except UNUSABLE as error:
                if not self.skip:
                    raise
                skipped.append(str(error))
        raise ImageFileError(
            f"{len(skipped)} images one after the other cannot be used, DATASET.on_error skip finds none to go on "
            f"with; the last: {skipped[-1]}"
        )

    def _in_order(self, wanted: dict, rng: np.random.Generator) -> Iterator[dict]:
        """A record, and what may take its place: others of its orientation, then all others. Drawing them changes no
        other draw."""
        yield wanted
        fit = (self.order.upright == self._is_upright(wanted)) | bool(self.augmentation.crop)
        own = rng.spawn(1)[0]
        for which in (fit, ~fit):
            for number in own.permutation(np.flatnonzero(which))[:MOST_TRIES]:
                if self.records[number] is not wanted:
                    yield self.records[number]


def images_to_device(batch: dict, device: torch.device | str) -> Tensor | list[Tensor]:
    """The pictures (N, 3, H, W) of a batch, or an item's at every scale, on a device, normalized if they are bytes."""
    x, how = copy_to_device(batch["img_data"], torch.device(device)), batch.get("normalization")
    if how is None:
        return x
    return [normalized(scale, how) for scale in x] if isinstance(x, list) else normalized(x, how, batch["sizes"])


def _subset(records: list[dict], max_sample: int, start_idx: int, end_idx: int) -> list[dict]:
    records = records[:max_sample] if max_sample > 0 else records
    return records[max(start_idx, 0) : end_idx if end_idx >= 0 else None]


class _Divisible(Records):
    """Records that are looked at once each."""

    def shard(self, number: int, parts: int):
        """The same data set with one of `parts` contiguous shares of the records, which differ by one at most."""
        share = shards(len(self.records), parts)[number]
        part = copy.copy(self)
        part.records = self.records[share.start : share.stop]
        part.skipped = self.skipped if number == 0 else []
        return part

    def with_skipping(self):
        """The same data set, which does with unusable records as `on_error` skip says."""
        part = copy.copy(self)
        part.skip = True
        return part

    def __getitem__(self, index: int) -> dict:
        """See `load`; with `on_error` skip `info` and `error`, a sentence, for a record that cannot be used."""
        record = self.records[index]
        try:
            return {**self.load(record), "info": record["fpath_img"]}
        except UNUSABLE as error:
            if not self.skip:
                raise
            return {"info": record["fpath_img"], "error": str(error)}

    def subsample(self, count: int):
        """The same data set with at most so many of the records, evenly spaced: neighbours are often alike."""
        part, there = copy.copy(self), len(self.records)
        count = min(count, there)
        part.records = [self.records[i * there // count] for i in range(count)]
        return part


class ValDataset(_Divisible, LabelledRecords):
    """Labelled pictures at every scale of evaluation.

    Args:
        root_dataset, odgt, opt: as for `TrainDataset`, without segm_downsampling_rate and random_flip.
        max_sample: take the first so many records; -1 all.
        start_idx, end_idx: then take this slice; -1 all.
    """

    def __init__(self, root_dataset, odgt, opt, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1):
        super().__init__(root_dataset, odgt, opt)
        self.records = _subset(self.records, max_sample, start_idx, end_idx)

    def load(self, record: dict) -> dict:
        """`img_ori` (H, W, 3) uint8, `img_data` list of (1, 3, h, w), `seg_label` (1, H, W) int64; an item has also
        `info`, the path."""
        image, label = self.pair(record)
        return {**self.views(image), "seg_label": torch.from_numpy(self.encode(label, record)).unsqueeze(0)}


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

    def load(self, record: dict) -> dict:
        """`img_ori` (H, W, 3) uint8, `img_data` list of (1, 3, h, w); an item has also `info`, the path."""
        return self.views(read_image(record["fpath_img"], limits=self.limits))
