"""Prepare a network for inference and compute label maps from several scales and flips of an image."""

import copy
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..lib.nn import compile_blocks
from ..lib.utils import UserError
from ..models.fuse_bn import fuse_batchnorm
from ..models.layers import image_convolutions
from .label_map import (
    label_map_from_logits,
    labels_of_strip,
    probability_strips,
    sample_positions,
    sampled_probabilities,
)
from .sliding_window import sliding_window_strips

logger = logging.getLogger(__name__)

PRECISIONS = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 and 64-bit Arm processors in /proc/cpuinfo


@dataclass(frozen=True)
class InferenceOptions:
    """Options for inference.

    Attributes:
        flip: average the probabilities of the image and of the horizontally flipped image.
        window_size: (height, width) of the sliding window; None uses the whole image.
        window_overlap: minimum overlap of neighboring windows as a fraction of the window size, at least 0 and below 1.
        precision: a key of `PRECISIONS`. `auto` is float32 with PyTorch's setting for TF32 convolutions on NVIDIA GPUs.
            `fp32` is float32 without TF32.
        compile: compile the blocks of the encoder, see `compile_blocks`.
    """

    flip: bool = False
    window_size: tuple[int, int] | None = None
    window_overlap: float = 1 / 3
    precision: str = "auto"
    compile: bool = False


class Prediction(NamedTuple):
    """Prediction for an image, on the device of the network.

    Attributes:
        label_map: (H, W) class indices, see `Predictor.label_map`.
        confidence: (H, W) float32, the largest class probability of every pixel.
        samples: (C, h, w) class probabilities of the pixels at `sample_positions`.
    """

    label_map: Tensor
    confidence: Tensor | None = None
    samples: Tensor | None = None


class Predictor:
    """A network prepared for inference on a device.

    Args:
        model: a `SegmentationModule` on the device, which is copied and prepared (see `prepare`); or another object
            with the method `logits` and the attribute `align_corners`, which is used unchanged. Class probabilities are
            the softmax of the logits divided by the attribute `temperature`, if the model has one.
        device: device of the model.
        options: options for inference.
    """

    def __init__(self, model, device: torch.device | str = "cpu", options: InferenceOptions | None = None):
        self.device, self.options = torch.device(device), options or InferenceOptions()
        self.network = prepare(model, self.device, self.options) if isinstance(model, nn.Module) else model
        self.temperature = getattr(model, "temperature", 1.0)

    def label_map(self, item: dict, logits: Sequence[Tensor] | None = None) -> Tensor:
        """Return the class with the largest probability at every pixel, without waiting for the device.

        Args:
            item: element of a `ValDataset` or `TestDataset`. `img_ori` is the image (H, W, 3); `img_data` is a list of
                normalized images (1, 3, h, w), one per scale.
            logits: replaces the result of `logits(item)`; not supported with a sliding window.

        Returns:
            (H, W) class indices on the device, uint8 for at most 256 classes, else int16.
        """
        return self._predict(item, logits).label_map

    def label_maps(self, items: Sequence[dict]) -> Iterator[Tensor]:
        """Yield the label map of every item, see `predict`."""
        return (prediction.label_map for prediction in self.predict(items))

    def predict(
        self, items: Sequence[dict], *, confidence: bool = False, samples: bool = False
    ) -> Iterator[Prediction]:
        """Yield the prediction for every item. On a GPU, consecutive images of equal size form a batch, so rounding may
        differ from `label_map`.

        Args:
            items: see `label_map`.
            confidence, samples: also compute these attributes of `Prediction`.
        """
        if self.device.type != "cuda" or self.options.window_size is not None:
            for item in items:
                yield self._predict(item, None, confidence=confidence, samples=samples)
            return
        for _, group in groupby(items, key=lambda item: [x.shape for x in item["img_data"]]):
            batch = list(group)
            logits = self._logits([torch.cat(same) for same in zip(*(x["img_data"] for x in batch), strict=True)])
            for i, item in enumerate(batch):
                yield self._predict(item, [x[i] for x in logits], confidence=confidence, samples=samples)

    @torch.inference_mode()
    def _predict(
        self, item: dict, logits: Sequence[Tensor] | None, *, confidence: bool = False, samples: bool = False
    ) -> Prediction:
        """Return the prediction for an item; `logits` are those of `logits(item)`, or None to compute them."""
        size, align_corners = tuple(item["img_ori"].shape[:2]), self.network.align_corners
        if self.options.window_size is not None:
            return self._predict_with_windows(item, size, confidence=confidence, samples=samples)
        logits = self.logits(item) if logits is None else logits
        scaled = self._scale(logits)
        label_map = label_map_from_logits(scaled if len(logits) > 1 else logits, size, align_corners=align_corners)
        largest = sampled = None
        if confidence:
            strips = probability_strips(scaled, size, align_corners=align_corners)
            largest = torch.cat([strip.amax(0).float() for strip in strips])
        if samples:
            sampled = sampled_probabilities(scaled, size, align_corners=align_corners)
        return Prediction(label_map, largest, sampled)

    def _predict_with_windows(
        self, item: dict, size: tuple[int, int], *, confidence: bool, samples: bool
    ) -> Prediction:
        (rows, columns), top = sample_positions(size), 0
        label_map, largest, sampled = [], [], []
        for strip in self._strips(item["img_data"], size):
            label_map.append(labels_of_strip(strip))
            if confidence:
                largest.append(strip.amax(0).float())
            if samples:
                first = rows.start - top if top <= rows.start else (rows.start - top) % rows.step
                sampled.append(strip[:, first :: rows.step, columns.start :: columns.step])
            top += strip.size(1)
        return Prediction(
            torch.cat(label_map), torch.cat(largest) if confidence else None, torch.cat(sampled, 1) if samples else None
        )

    def _scale(self, logits: Sequence[Tensor]) -> Sequence[Tensor]:
        return logits if self.temperature == 1 else [x / self.temperature for x in logits]

    @torch.inference_mode()
    def top_classes(self, item: dict, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable classes of every pixel.

        Args:
            item: see `label_map`.
            count: number of classes to return per pixel.

        Returns:
            Class indices (count, H, W) int64 and probabilities (count, H, W) float32, by descending probability.
        """
        best = [strip.topk(count, dim=0) for strip in self._strips(item["img_data"], tuple(item["img_ori"].shape[:2]))]
        return (
            np.concatenate([part.indices.cpu().numpy() for part in best], axis=1),
            np.concatenate([part.values.float().cpu().numpy() for part in best], axis=1),
        )

    def logits(self, item: dict) -> list[Tensor]:
        """Return one tensor of logits (C, h, w), float32 or float64, per scale and flip; `item`: see `label_map`."""
        return [x[0] for x in self._logits(item["img_data"])]

    @torch.inference_mode()
    def probabilities(self, scales: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return class probabilities averaged over scales, flips and windows.

        Args:
            scales: normalized images (1, 3, h, w), one per scale.
            size: (height, width) of the image.

        Returns:
            (C, height, width) on the device; the sum over C is 1.
        """
        return torch.cat(list(self._strips(scales, size)), dim=1)

    @torch.inference_mode()
    def _logits(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor of logits (N, C, h, w), float32 or float64, per scale and flip."""
        logits = []
        with self._arithmetic():
            for x in (scale.to(self.device, non_blocking=True) for scale in scales):
                logits.append(self.network.logits({"img_data": x}))
                if self.options.flip:
                    logits.append(self.network.logits({"img_data": x.flip(-1)}).flip(-1))
        return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits]

    @torch.inference_mode()
    def _strips(self, scales: Sequence[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield strips (C, n, width) of class probabilities, from top to bottom."""
        align_corners = self.network.align_corners
        if self.options.window_size is None:
            logits = self._scale([x[0] for x in self._logits(scales)])
            yield from probability_strips(logits, size, align_corners=align_corners)
        else:
            yield from self.window_strips(scales, size, self.options.window_size)

    def window_strips(
        self, scales: Sequence[Tensor], size: tuple[int, int], window: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Yield class probabilities of sliding windows, see `sliding_window_strips`."""
        return sliding_window_strips(
            lambda regions: self._scale(self._logits([regions])),
            scales,
            size,
            window,
            self.options.window_overlap,
            self.network.align_corners,
        )

    def _arithmetic(self) -> AbstractContextManager:
        strict = self.options.precision == "fp32" and self.device.type == "cuda"
        return _without_tf32() if strict else nullcontext()


def prepare(module: nn.Module, device: torch.device | str, options: InferenceOptions) -> nn.Module:
    """Return a copy of a network with fused batch norms, with the precision and the compilation set in `options`.

    Args:
        module: a `SegmentationModule` on the device.

    Raises:
        UserError: the precision is fp16 on a CPU, or bf16 on a GPU that does not support bfloat16.
    """
    kind, precision = torch.device(device).type, options.precision
    if precision == "fp16" and kind == "cpu":
        raise UserError("INFERENCE.precision fp16 works only on GPUs; on the CPU set INFERENCE.precision bf16 or auto")
    if precision == "bf16" and lacks_bfloat16(device):
        raise UserError(
            f"INFERENCE.precision bf16: {device} does not support bfloat16; set INFERENCE.precision fp16 or auto"
        )
    if precision == "bf16" and kind == "cpu" and not cpu_has_bfloat16():
        logger.warning(
            "INFERENCE.precision bf16: this processor has no bfloat16 instructions; INFERENCE.precision auto is faster"
        )
    network = fuse_batchnorm(module)
    if PRECISIONS[precision] != torch.float32:
        logger.info("inference in %s; some pixels may get another class than in float32", precision)
        _convert_to_16_bit(network, PRECISIONS[precision])
    if options.compile:
        compile_blocks(network.encoder)  # not the decoder, because it is fast and caches matrices per image size
    return network


class _Float32Layer(nn.Module):
    """A layer that computes in float32 and converts its output to `dtype`."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer.float(), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(self.dtype)


def _convert_to_16_bit(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network to a 16-bit type, except the convolutions of the image and the classifier.

    In 16 bits, the image would be rounded to fewer colors, and the classifier would often
    return equal logits for two classes.
    """

    classifier = [name for name, part in network.decoder.conv_last.named_modules() if isinstance(part, nn.Conv2d)]
    names = [(network.encoder, name, dtype) for name in image_convolutions(network.encoder)]
    names.append((network.decoder, f"conv_last.{classifier[-1]}".rstrip("."), torch.float32))
    layers = [
        (part, name, _Float32Layer(copy.deepcopy(part.get_submodule(name)), output)) for part, name, output in names
    ]
    network.to(dtype)
    for part, name, layer in layers:
        part.set_submodule(name, layer)


def lacks_bfloat16(device: torch.device | str) -> bool:
    """Return whether a device is a GPU without bfloat16 arithmetic."""
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions according to /proc/cpuinfo; True on Apple silicon."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.machine() == "arm64"
    lines = [line for line in path.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return any(BFLOAT16_FLAGS & set(line.split()) for line in lines)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Context that disables TF32 in cuDNN convolutions. The setting has another name from PyTorch 2.9 on."""
    cudnn = torch.backends.cudnn
    new, old = ("fp32_precision", "ieee"), ("allow_tf32", False)
    switch, (name, strict) = (cudnn.conv, new) if hasattr(cudnn, "conv") else (cudnn, old)
    before = getattr(switch, name)
    setattr(switch, name, strict)
    try:
        yield
    finally:
        setattr(switch, name, before)
