"""Quantize an exported ONNX network to 8-bit integers, and evaluate ONNX files."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..dataset import ValDataset
from ..evaluation import InferenceOptions, Predictor, evaluate
from ..evaluation.evaluator import Evaluation, LoadOptions, read_items
from ..lib.utils import atomic_write, progress_bar

logger = logging.getLogger(__name__)

OPERATORS = ["Conv", "Relu", "Clip", "Add", "MaxPool", "Concat"]  # ONNX operators that are quantized


class OnnxNetwork:
    """An ONNX file as network for `Predictor`, with the required method `logits` and attribute `align_corners`."""

    def __init__(self, path: Path, *, align_corners: bool = False):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.align_corners = align_corners
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, feed: dict) -> Tensor:
        """Return logits (N, C, H, W) for the normalized images `feed["img_data"]` (N, 3, H, W)."""
        return torch.from_numpy(self._session.run(None, {"image": feed["img_data"].contiguous().numpy()})[0])


def quantize(source: Path, path: Path, dataset: ValDataset) -> None:
    """Write an int8 copy of an ONNX file in QDQ format, with unsigned activations and signed weights.

    Weights have a scale per output channel. Ranges of activations are calibrated with the images of `dataset`. The last
    convolution (classifier) is not quantized.
    """
    import onnx
    from onnxruntime import quantization

    inputs = _calibration_inputs(dataset)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(inputs, None)

    with atomic_write(path) as partial, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared = Path(folder, "prepared.onnx")
        quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
        quantization.quantize_static(
            prepared,
            partial,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=convolutions[-1:],
        )
        model = onnx.load(partial)
        model.metadata_props.extend(onnx.load(source, load_external_data=False).metadata_props)
        onnx.save_model(model, partial)


def _calibration_inputs(dataset: ValDataset) -> Iterator[dict[str, np.ndarray]]:
    items = read_items(dataset, "cpu", LoadOptions(workers=0))
    for item in progress_bar(items, total=len(dataset), desc="calibrating", unit="img"):
        if "error" in item:
            logger.warning("skipped: %s", item["error"])
            continue
        for scale in item["img_data"]:
            yield {"image": scale.contiguous().numpy()}


def evaluate_files(
    paths: Sequence[Path], dataset: ValDataset, align_corners: bool, inference: InferenceOptions
) -> list[Evaluation]:
    """Evaluate every ONNX file on a validation set, with the same metrics as eval.py."""
    evaluations = []
    for path in paths:
        predictor = Predictor(OnnxNetwork(path, align_corners=align_corners), "cpu", inference)
        evaluations.append(evaluate(predictor, dataset, loading=LoadOptions(workers=0)))
    for message in evaluations[0].skipped:
        logger.warning("skipped: %s", message)
    return evaluations
