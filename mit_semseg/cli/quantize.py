"""Quantize exported ONNX networks to 8-bit integers."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..dataset import ValDataset
from ..evaluation import InferenceOptions, Predictor, evaluate
from ..evaluation.evaluator import Evaluation, LoadOptions, read_items
from ..lib.utils import UserError, atomic_write, progress_bar

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES, SCORED_IMAGES = 32, 100  # defaults
OPERATORS = ("Conv", "Relu", "Clip", "Add", "MaxPool", "Concat")
TEST_SHAPES = ((1, 3, 65, 97), (2, 3, 120, 81))


class QuantizationError(UserError, RuntimeError):
    """A network cannot be quantized. No file is written."""


class OnnxNetwork:
    """An ONNX file with the interface of a `SegmentationModule` for inference.

    Args:
        path: file whose output are logits.
        align_corners: of the resize of the logits.
    """

    def __init__(self, path: str | Path, *, align_corners: bool = False):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.align_corners = align_corners
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, feed: dict) -> Tensor:
        """Return logits (N, C, H, W) for `img_data` (N, 3, H, W)."""
        return torch.from_numpy(self._session.run(None, {"image": feed["img_data"].contiguous().numpy()})[0])


def quantize(source: Path, path: Path, dataset: ValDataset) -> None:
    """Write an int8 copy of an ONNX file: static QDQ, unsigned activations, signed weights per output channel.

    The last convolution (classifier) stays in float32.

    Args:
        source: file whose output are logits.
        path: output file.
        dataset: images for the calibration of the activation ranges.

    Raises:
        QuantizationError: ONNX Runtime failed, or the outputs are not finite.
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
            self._inputs = _calibration_inputs(dataset)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._inputs, None)

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
        except Exception as error:  # ONNX Runtime raises exceptions of any type
            raise QuantizationError(f"ONNX Runtime cannot quantize {path.name}: {error}") from error
        model = onnx.load(partial)
        model.metadata_props.extend(onnx.load(source, load_external_data=False).metadata_props)
        onnx.save_model(model, partial)
        _check_outputs(source, partial)


def _calibration_inputs(dataset: ValDataset) -> Iterator[dict[str, np.ndarray]]:
    items = read_items(dataset, "cpu", LoadOptions(workers=0))
    for item in progress_bar(items, total=len(dataset), desc="calibrating", unit="img"):
        if "error" in item:
            logger.warning("skipped: %s", item["error"])
            continue
        for scale in item["img_data"]:
            yield {"image": scale.contiguous().numpy()}


def _check_outputs(source: Path, path: Path) -> None:
    float32, int8 = OnnxNetwork(source), OnnxNetwork(path)
    for shape in TEST_SHAPES:
        feed = {"img_data": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        expected, actual = float32.logits(feed), int8.logits(feed)
        if actual.shape != expected.shape or not actual.isfinite().all():
            raise QuantizationError(f"the int8 network has outputs of wrong shape or not finite for input {shape}")


def evaluate_int8(
    source: Path, path: Path, dataset: ValDataset, *, align_corners: bool, inference: InferenceOptions | None = None
) -> list[Evaluation]:
    """Evaluate the float32 file `source` and the int8 file `path`, as eval.py does."""
    evaluations = []
    for file in (source, path):
        predictor = Predictor(OnnxNetwork(file, align_corners=align_corners), "cpu", inference)
        evaluations.append(evaluate(predictor, dataset, loading=LoadOptions(workers=0)))
    for message in evaluations[0].skipped:
        logger.warning("skipped: %s", message)
    return evaluations
