"""Python interface to segment images with a trained network, also used by test.py and the web page."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..build import auto_device, build_module, inference_options
from ..config import Config, load_config
from ..dataset import ClassTable, TestDataset
from ..dataset.bands import BandImage
from ..dataset.classes import class_table_from_options
from ..dataset.transforms import images_to_device
from ..evaluation import InferenceOptions, Predictor
from ..evaluation.evaluator import LoadOptions, predict_items, read_items
from ..lib.nn.scatter import as_device
from ..lib.utils import UserError, expand_path
from ..models.pretrained import PUBLISHED, download_published, published_options
from . import hub
from .images import to_image
from .network_file import read_network, write_network
from .raster import segment_raster
from .results import Result, with_unique_stems

NOT_SAVED = "only networks that were loaded from a configuration or a file can be saved"


class Segmenter:
    """A network that segments images. It is thread-safe; concurrent calls are serialized.

        segmenter = Segmenter.from_config("config/quickstart.yaml")
        result = segmenter("street.jpg")
        result.overlay().show()

    Args:
        module: a `SegmentationModule`, which is moved to the device and copied for inference.
        table: class names and colors.
        options: object with imgSizes, imgMaxSize, padding_constant, and optionally normalization and eval_resize.
        device: device for inference.
        inference: inference options.
    """

    def __init__(
        self, module: nn.Module, table: ClassTable, options, *, device="cpu", inference: InferenceOptions | None = None
    ):
        self.table, self.device, self._options = table, as_device(device), options
        self._predictor = Predictor(module.to(self.device), self.device, inference)
        self._dataset = TestDataset([], options).as_uint8()
        self._lock = threading.Lock()
        self._cfg: Config | None = None  # `save` needs the options and the unchanged network
        self._load: Callable[[], nn.Module] | None = None
        self._checkpoint = ""  # checkpoint in DIR, or '' for a network file

    @classmethod
    def from_config(
        cls, path: str | Path, checkpoint: str | None = None, opts: Sequence = (), *, device: str = "auto"
    ) -> "Segmenter":
        """Load the network of a training run.

        Args:
            path: configuration file (YAML).
            checkpoint: suffix of a checkpoint in DIR, e.g. `best.pth`, or path of a file; None for TEST.checkpoint.
            opts: configuration options `[key, value, ...]`, as on the command line.
            device: `auto` (the first GPU, or the CPU if there is none), `cpu`, `cuda`, `cuda:1` or `mps`.
        """
        cfg = load_config(path, opts)
        return cls.from_cfg(cfg, checkpoint or cfg.TEST.checkpoint, auto_device(device))

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto", opts: Sequence = ()) -> "Segmenter":
        """Load a published network, one of `Segmenter.names()`, or a network `hf:USER/NAME` on the Hugging Face hub.

        The weights are downloaded on first use.
        """
        if name.startswith(hub.PREFIX):
            return cls.from_file(hub.download(name), device=device, opts=opts)
        folder = download_published(name)[0].parent
        cfg = load_config(None, [*published_options(name), "DIR", str(folder), *opts])
        return cls.from_cfg(cfg, cfg.TEST.checkpoint, auto_device(device))

    @classmethod
    def from_file(cls, path: str | Path, *, device: str = "auto", opts: Sequence = ()) -> "Segmenter":
        """Load a network file, which was written by `save` or `python -m mit_semseg.export --format safetensors`.

        The arguments are those of `from_config`. The file contains weights, options and classes.
        """
        module, cfg, table = read_network(path, opts)
        segmenter = cls(module, table, cfg.DATASET, device=auto_device(device), inference=inference_options(cfg))
        segmenter._cfg, segmenter._load = cfg, lambda: read_network(path, opts)[0]
        return segmenter

    @staticmethod
    def names() -> list[str]:
        """Return the names of the published networks."""
        return list(PUBLISHED)

    @classmethod
    def from_cfg(cls, cfg: Config, checkpoint: str, device: torch.device) -> "Segmenter":
        """Build the network of a configuration and load a checkpoint, see `from_config`."""
        module = build_module(cfg, device, checkpoint=checkpoint)
        table = class_table_from_options(cfg.DATASET)
        segmenter = cls(module, table, cfg.DATASET, device=device, inference=inference_options(cfg))
        segmenter._cfg, segmenter._checkpoint = cfg, checkpoint
        segmenter._load = lambda: build_module(cfg, torch.device("cpu"), checkpoint=checkpoint)
        return segmenter

    def save(self, path: str | Path) -> None:
        """Write a network file (.safetensors) with weights, options and classes, see `from_file`.

        The weights are read again from the checkpoint or file from which this network was loaded.
        """
        if not self._load:
            raise UserError(NOT_SAVED)
        write_network(self._load(), self._cfg, self.table, expand_path(str(path)))

    def push_to_hub(self, name: str, *, example=None, private: bool = False, token: str | None = None) -> str:
        """Upload the network file and a model card to the Hugging Face hub, and return the address.

        The card has the metrics in DIR/result/results.json if `eval.py` has written them for the same checkpoint.

        Args:
            name: USER/NAME; the repository is created if it does not exist.
            example: image whose panel [image | prediction] is uploaded too, see `__call__`.
            private: whether a new repository is private.
            token: access token; None uses the one saved by `hf auth login`.
        """
        name = name.removeprefix(hub.PREFIX)
        if name.count("/") != 1:
            raise UserError(f"{name!r} is not a name on the hub; give USER/NAME")
        if not self._cfg:
            raise UserError(NOT_SAVED)
        panel = self(example).panel() if example is not None else None
        network = f"{self._cfg.MODEL.arch_encoder} + {self._cfg.MODEL.arch_decoder}"
        results = hub.read_results(self._cfg.DIR, self._checkpoint)
        card = hub.model_card(name, network, self.table, results, with_example=example is not None)
        return hub.upload(name, self.save, card, panel, private=private, token=token)

    def __call__(self, image) -> Result | list[Result]:
        """Segment an image, or a list or tuple of images; see `to_image` for supported types and for errors."""
        if isinstance(image, (list, tuple)):
            return with_unique_stems([self._segment(entry, f"image_{number}") for number, entry in enumerate(image)])
        return self._segment(image, "image")

    def _segment(self, image, name: str) -> Result:
        name, image = to_image(image, name, self._dataset.bands)
        with self._lock:
            item = self._preprocess(image)
            label_map = self._predictor.label_map(item)
        return self._result(name, image, item["img_ori"], label_map)

    def _preprocess(self, image: Image.Image | BandImage) -> dict:
        item = self._dataset.multi_scale(image)
        return {"img_ori": np.asarray(item["img_ori"]), "img_data": images_to_device(item, self.device)}

    def _result(
        self,
        name: str,
        image: Image.Image | BandImage | None,
        pixels: np.ndarray,
        label_map: torch.Tensor,
        confidence: torch.Tensor | None = None,
    ) -> Result:
        """Return a result; `image` is None if the image must be read again from the path `name` when it is needed."""
        labels, largest = label_map.cpu().numpy().astype(np.int64), None if confidence is None else confidence.numpy()
        source = image if self._dataset.bands else pixels
        return Result(name, pixels, labels, self.table, partial(self._top_classes, name, source), _confidence=largest)

    def _top_classes(
        self, path: str, source: np.ndarray | BandImage | None, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        image = self._dataset.read(path) if source is None else source
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        with self._lock:
            return self._predictor.top_classes(self._preprocess(image), count)

    def segment_frames(self, frames: Iterable[np.ndarray], *, smoothing: float = 0.0) -> Iterator[Result]:
        """Segment video frames (H, W, 3) uint8 RGB of equal size, and yield a result for every frame.

        Args:
            frames: frames in the order of the video.
            smoothing: weight of the previous frames in an exponential moving average of the logits, from 0 (off) to
                below 1. Smoothing is not supported with a sliding window.
        """
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}")
        if smoothing and self._predictor.options.window_size is not None:
            raise UserError("smoothing is not supported with a sliding window; set INFERENCE.window_size 0")
        mean: list[torch.Tensor] | None = None
        for number, frame in enumerate(frames):
            if not smoothing:
                yield self._segment(frame, f"frame_{number}")
                continue
            name, image = to_image(frame, f"frame_{number}", self._dataset.bands)
            with self._lock:
                item = self._preprocess(image)
                logits = self._predictor.logits(item)
                mean = [torch.lerp(new, old, smoothing) for new, old in zip(logits, mean or logits, strict=True)]
                label_map = self._predictor.label_map(item, mean)
            yield self._result(name, image, item["img_ori"], label_map)

    def segment_raster(
        self,
        path: str | Path,
        stem: str | Path,
        suffixes: Sequence[str] = ("_index.tif",),
        *,
        min_confidence: float = 0,
    ) -> list[Path]:
        """Segment a large or georeferenced image in bounded memory, and return the paths of the written TIFF files.

        The arguments and errors are those of `raster.segment_raster`.
        """
        data = self._dataset
        options = {"bands": data.bands, "normalization": data.normalization, "multiple": data.padding_constant}
        options |= {"suffixes": suffixes, "min_confidence": min_confidence}
        with self._lock:
            return segment_raster(self._predictor, path, stem, self.table, **options)

    def segment_files(
        self, paths: Sequence[str], loading: LoadOptions, *, confidence: bool = False
    ) -> Iterator[Result | tuple[str, str]]:
        """Yield the results of image files in order; for an unreadable file, yield (path, error message) instead.

        With `confidence`, the confidence of every result is computed together with the label map.
        """
        dataset = TestDataset([{"fpath_img": path} for path in paths], self._options).with_skipping()
        items = read_items(dataset, self.device, loading)
        results = predict_items(
            self._predictor, items, loading.batch_size, lambda item, prediction: prediction, confidence=confidence
        )
        while True:
            with self._lock:
                item, prediction = next(results, (None, None))
            if item is None:
                return
            if prediction is None:
                yield item["info"], item["error"]
            else:
                yield self._result(item["info"], None, item["img_ori"], prediction.label_map, prediction.confidence)
