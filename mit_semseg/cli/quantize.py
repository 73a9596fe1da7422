"""Exported networks in 8-bit integers: scales and offsets from calibration pictures, and what that costs."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..dataset import ValDataset
from ..evaluation import InferenceOptions, evaluate
from ..evaluation.evaluator import read_items
from ..evaluation.inference import DEFAULT_INFERENCE
from ..lib.utils import UserError, atomic_write, progress_bar

logger = logging.getLogger(__name__)

CALIBRATION = 32  # pictures, by default
SCORED = 100  # validation pictures by which the loss is measured, by default
# What goes on in integers between convolutions; scores stay in float32.
OPERATORS = ("Conv", "Relu", "Clip", "Add", "MaxPool", "Concat")


class QuantizationError(UserError, RuntimeError):
    """An 8-bit file that was not written; the message says why."""


@dataclass(frozen=True)
class Cost:
    """Mean IoU (0..1) of the network in float32 and in 8 bits, over a number of pictures."""

    exact: float
    rounded: float
    pictures: int

    def __str__(self) -> str:
        exact, rounded = 100 * self.exact, 100 * self.rounded
        return (
            f"mean IoU {exact:.2f} % in float32, {rounded:.2f} % in 8 bits ({rounded - exact:+.2f} points) "
            f"on {self.pictures} validation pictures"
        )


class OnnxNetwork:
    """An ONNX file of class scores, to be called as a network is in inference.

    Args:
        path: of the file.
        align_corners: how its scores are resized.
        threads: of ONNX Runtime.
    """

    def __init__(self, path: str | Path, *, align_corners: bool = False, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.align_corners = align_corners
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, feed: dict) -> Tensor:
        """Class scores (N, C, H, W) of `img_data` (N, 3, H, W)."""
        return torch.from_numpy(self._session.run(None, {"image": feed["img_data"].contiguous().numpy()})[0])


def labelled_pictures(cfg: Config) -> tuple[ValDataset, ValDataset]:
    """Training pictures to calibrate with, and validation pictures to measure the loss on.

    Raises:
        UserError: a list cannot be read.
    """
    data = cfg.DATASET
    return tuple(ValDataset(data.root_dataset, source, data) for source in (data.list_train, data.list_val))


def quantize(source: Path, path: Path, pictures: ValDataset) -> None:
    """Write an 8-bit copy of an ONNX file: QDQ, unsigned values, signed weights with a scale per output channel.

    The last convolution, which makes the scores, stays in float32.

    Args:
        source: file of class scores.
        path: to write.
        pictures: all of which are looked at, for the ranges of the values between the layers.

    Raises:
        QuantizationError: ONNX Runtime cannot do it, or the file does not give finite scores of the right shape.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._views = _views(pictures)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._views, None)

    with atomic_write(path) as partial, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared = Path(folder, "prepared.onnx")
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
            quantize_static(
                prepared,
                partial,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=convolutions[-1:],
            )
        except (UserError, OSError):
            raise
        except Exception as error:  # ONNX Runtime raises any
            raise QuantizationError(f"ONNX Runtime cannot write {path.name} in 8 bits: {error}") from error
        _copy_about(source, partial)
        _check(source, partial)


def _views(pictures: ValDataset) -> Iterator[dict[str, np.ndarray]]:
    items = read_items(pictures, device="cpu", workers=0)
    for item in progress_bar(items, total=len(pictures), desc="calibrating", unit="img"):
        if "error" in item:
            logger.warning("left out: %s", item["error"])
            continue
        for view in item["img_data"]:
            yield {"image": view.contiguous().numpy()}


def _copy_about(source: Path, path: Path) -> None:
    import onnx

    model = onnx.load(path)
    for entry in onnx.load(source, load_external_data=False).metadata_props:
        model.metadata_props.add(key=entry.key, value=entry.value)
    onnx.save_model(model, path)


def _check(source: Path, path: Path, shapes: Sequence[tuple[int, ...]] = ((1, 3, 65, 97), (2, 3, 120, 81))) -> None:
    exact, rounded = OnnxNetwork(source), OnnxNetwork(path)
    for shape in shapes:
        feed = {"img_data": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        expected, scores = exact.logits(feed), rounded.logits(feed)
        if scores.shape != expected.shape or not scores.isfinite().all():
            raise QuantizationError(f"the 8-bit network does not give finite scores for pictures {shape}")


def cost(
    source: Path, path: Path, dataset: ValDataset, *, align_corners: bool, view: InferenceOptions = DEFAULT_INFERENCE
) -> Cost:
    """Mean IoU of both files on a data set, as eval.py computes it of the network."""
    exact, rounded = (
        evaluate(OnnxNetwork(file, align_corners=align_corners), dataset, view=view, workers=0)
        for file in (source, path)
    )
    for sentence in exact.skipped:
        logger.warning("left out: %s", sentence)
    return Cost(exact.summary.mean_iou, rounded.summary.mean_iou, exact.images)
