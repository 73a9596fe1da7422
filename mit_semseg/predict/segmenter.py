"""Segmenting pictures: the few-line interface, and what test.py does with it."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..build import auto_device, build_module, inference_options
from ..config import Config, load_config
from ..dataset import ClassTable, TestDataset
from ..dataset.datasets import images_to_device
from ..dataset.pairs import class_table_of
from ..evaluation.evaluator import read_items
from ..evaluation.inference import DEFAULT_INFERENCE, InferenceOptions, label_map, label_maps, top_classes, view_logits
from ..evaluation.label_map import label_map_from_logits
from ..lib.nn.scatter import as_device
from ..models.pretrained import PUBLISHED, download_published, published_options
from .images import to_image
from .results import Result, with_own_names


class Segmenter:
    """A network ready to segment pictures; may be used from several threads, which then wait for one another.

        segmenter = Segmenter.from_config("config/quickstart.yaml")
        result = segmenter("street.jpg")
        result.overlay().show()

    Args:
        module: a `SegmentationModule`, of which a copy is made for inference (see `evaluation.network`).
        table: class names and colours.
        options: object with imgSizes, imgMaxSize, padding_constant, and optionally normalization, eval_resize,
            max_pixels, max_bytes.
        device: where the module is to be.
        view: mirrored, windows, precision.

    Attributes:
        table: class names and colours.
        device: where the network is.
    """

    def __init__(
        self,
        module: nn.Module,
        table: ClassTable,
        options,
        *,
        device: torch.device | str = "cpu",
        view: InferenceOptions = DEFAULT_INFERENCE,
    ):
        self.table, self.device, self._options, self._view = table, as_device(device), options, view
        self._network = view.network(module.to(self.device), self.device)
        self._scales = TestDataset([{"fpath_img": "given"}], options).as_uint8()
        self._lock = threading.Lock()

    @classmethod
    def from_config(
        cls, path: str | Path, checkpoint: str | None = None, opts: Sequence = (), *, device: str = "auto"
    ) -> "Segmenter":
        """From the options and the weights of a training run.

        Args:
            path: YAML file.
            checkpoint: of the run's folder (DIR), e.g. `best.pth`, or a file; None is what TEST.checkpoint says.
            opts: `[key, value, ...]`, as at the end of a command line.
            device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`.

        Raises:
            UserError: the file, an option, the weights or the device cannot be used; says what to do.
        """
        cfg = load_config(path, opts)
        return cls.from_cfg(cfg, checkpoint or cfg.TEST.checkpoint, auto_device(device))

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto", opts: Sequence = ()) -> "Segmenter":
        """With published weights, which are downloaded at the first use.

        Args:
            name: one of `Segmenter.names()`, e.g. `ade20k-resnet50dilated-ppm_deepsup`.
            device, opts: as of `from_config`.

        Raises:
            UserError: unknown name, or the weights cannot be had.
        """
        folder = download_published(name)[0].parent
        cfg = load_config(None, [*published_options(name), "DIR", str(folder), *opts])
        return cls.from_cfg(cfg, cfg.TEST.checkpoint, auto_device(device))

    @staticmethod
    def names() -> list[str]:
        """Names of the published networks."""
        return list(PUBLISHED)

    @classmethod
    def from_cfg(cls, cfg: Config, checkpoint: str, device: torch.device) -> "Segmenter":
        """With the network that options describe, and a checkpoint of it."""
        module = build_module(cfg, device, checkpoint=checkpoint)
        return cls(module, class_table_of(cfg.DATASET), cfg.DATASET, device=device, view=inference_options(cfg))

    def __call__(self, picture) -> Result | list[Result]:
        """Segment a picture, or every one of a list.

        Args:
            picture: a path; the bytes of an image file; a PIL image; an array (H, W, 3) or (H, W) uint8; a tensor
                (3, H, W), uint8 or floating point in 0..1; or a list or tuple of such.

        Raises:
            ImageFileError: a file that is no readable image.
            UnsupportedImageError: something that is no picture.
        """
        if isinstance(picture, (list, tuple)):
            return with_own_names([self._segment(one, f"picture_{number}") for number, one in enumerate(picture)])
        return self._segment(picture, "picture")

    def _segment(self, picture, name: str) -> Result:
        name, image = to_image(picture, name, self._scales.limits)
        pixels = np.array(image)
        with self._lock:
            labels = label_map(self._network, self._item(pixels), self.device, self._view)
        return Result(name, pixels, labels, self.table, self._top_classes)

    def _item(self, pixels: np.ndarray) -> dict:
        """What the network looks at."""
        item = self._scales.views(to_image(pixels)[1])
        return {"img_ori": pixels, "img_data": images_to_device(item, self.device)}

    def _top_classes(self, pixels: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            return top_classes(self._network, self._item(pixels), top, self.device, self._view)

    def frames(self, pictures: Iterable[np.ndarray], *, smoothing: float = 0.0) -> Iterator[Result]:
        """Segment pictures that follow each other in time.

        Args:
            pictures: (H, W, 3) uint8 RGB each, of one size.
            smoothing: share of the previous pictures in the scores (logits) of each, an exponential mean: 0 (none) to
                below 1. Not with windows.

        Raises:
            ValueError: another share, or windows.
        """
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing {smoothing}: give a share of 0 (none) to below 1")
        if smoothing and self._view.window is not None:
            raise ValueError("smoothing needs the whole picture: set INFERENCE.window_size 0")
        before: list[torch.Tensor] | None = None
        for number, picture in enumerate(pictures):
            if not smoothing:
                yield self._segment(picture, f"frame_{number}")
                continue
            pixels = np.array(to_image(picture)[1])
            with self._lock:
                logits = view_logits(self._network, self._item(pixels), self.device, self._view)
                if before is not None:
                    logits = [torch.lerp(x, old, smoothing) for x, old in zip(logits, before, strict=True)]
                before, size = logits, pixels.shape[:2]
                labels = label_map_from_logits(logits, size, align_corners=self._network.align_corners).cpu().numpy()
            yield Result(f"frame_{number}", pixels, labels, self.table, self._top_classes)

    def segment_files(self, paths: Sequence[str], **reading) -> Iterator[Result | tuple[str, str]]:
        """Segment picture files one after the other; reading goes on in the background.

        Args:
            paths: of the pictures.
            reading: options of `evaluator.read_items`.

        Yields:
            A `Result` for every picture, or (path, reason) for one that cannot be read.
        """
        pictures = TestDataset([{"fpath_img": path} for path in paths], self._options).with_skipping()
        items = read_items(pictures, device=self.device, **reading)
        while group := list(islice(items, reading.get("batch_size", 1))):
            good = [item for item in group if "error" not in item]
            with self._lock:
                maps = iter(list(label_maps(self._network, good, self.device, self._view)))
            for item in group:
                if "error" in item:
                    yield item["info"], item["error"]
                else:
                    yield Result(item["info"], item["img_ori"], next(maps), self.table, self._top_classes)
