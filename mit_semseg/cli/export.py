"""Export a trained network to one file with class names, colors and normalization.

    python -m mit_semseg.export --cfg config/NAME.yaml --format onnx [--out FILE] [KEY VALUE ...]

An ONNX or torch_export file can be used without this package. Its input is a batch of normalized images (N, C, H, W) of
at least 32x32 pixels. Its output is logits (N, C, H, W) or, with `--output labels`, class indices (N, H, W). A
safetensors file contains the weights and options for `Segmenter.from_file`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..build import build_module, build_val_dataset, inference_options
from ..config import Config, add_config_arguments, load_config
from ..dataset import ValDataset
from ..dataset.classes import class_table_from_options
from ..dataset.transforms import round_up
from ..lib.utils import UserError, atomic_write, expand_path, first_sentence
from ..models.fuse_bn import fuse_batchnorm
from ..predict.network_file import describe_network, write_network
from .common import DEFAULT_CONFIG, add_verbosity
from .logs import setup_logger
from .quantize import OnnxNetwork, evaluate_files, quantize

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
OUTPUTS = ("logits", "labels")
OPSET = 18  # lowest ONNX opset version with antialiased resizing
# Shapes of inputs; the sides are rounded up to multiples of the encoder's `size_divisor`, see `make_input`
EXAMPLE_SHAPE = (2, 72, 104)  # (N, H, W), for tracing; all are dynamic
TEST_SHAPES = ((1, 65, 97), (2, 120, 81), (1, 33, 129))
TOLERANCE = 1e-4  # maximum allowed difference returned by `compare`


class ExportError(UserError, RuntimeError):
    """A network cannot be exported; no file was written."""


class ExportedNetwork(nn.Module):
    """Copy of a `SegmentationModule` for export; `output` is one of `OUTPUTS`."""

    def __init__(self, module: nn.Module, output: str):
        super().__init__()
        fused = fuse_batchnorm(module).to(memory_format=torch.contiguous_format)
        self.encoder, self.decoder, self.output = fused.encoder, fused.decoder, output

    def forward(self, image: Tensor) -> Tensor:
        """Map normalized images (N, C, H, W) to logits (N, C, H, W) or class indices (N, H, W) int64."""
        return self.output_of(self.logits(image))

    def logits(self, image: Tensor) -> Tensor:
        logits = self.decoder.head(self.encoder(image, return_feature_maps=True))
        return self.decoder.resize(logits, image.shape[-2:])

    def output_of(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=1) if self.output == "labels" else logits


def export(module: nn.Module, path: Path, *, kind: str, output: str = "logits", metadata: dict[str, str]) -> float:
    """Export a `SegmentationModule` to a file and return the output difference measured by `compare`.

    `kind` is 'onnx' or 'torch_export', `output` is one of `OUTPUTS`, and `metadata` is stored in the file. Raise an
    `ExportError` if a package is missing, if the network cannot be exported for images of any size, or if the outputs
    of file and network differ by more than `TOLERANCE`.
    """
    network = ExportedNetwork(module, output).eval()
    with atomic_write(path) as partial:
        try:
            exported = (_write_onnx if kind == "onnx" else _write_program)(network, partial, metadata)
            difference = compare(network, exported)
        except ExportError:
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not written, because the exporter failed, or the file does not support images of any size "
                f"({first_sentence(error)}); try another --format than {kind}"
            ) from error
        if not difference <= TOLERANCE:  # also refuses NaN
            raise ExportError(
                f"{path} was not written, because outputs of file and network differ by {difference:.1e}, which is "
                f"more than {TOLERANCE:.0e}; try another PyTorch version or another --format than {kind}"
            )
    return difference


@torch.inference_mode()
def compare(network: ExportedNetwork, exported: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference between the outputs of `network` and `exported` for inputs of `TEST_SHAPES`.

    Differences are divided by the largest logit. For class indices, the difference of a pixel is that of the logits of
    the two classes.
    """
    differences = []
    for seed, shape in enumerate(TEST_SHAPES):
        x = make_input(network, shape, seed)
        logits, actual = network.logits(x), exported(x.clone())
        expected = network.output_of(logits)
        if actual.shape != expected.shape:
            raise ExportError(
                f"input {tuple(x.shape)}: got output {tuple(actual.shape)}, expected {tuple(expected.shape)}"
            )
        if network.output == "labels":
            expected, actual = (logits.gather(1, classes[:, None]) for classes in (expected, actual))
        differences.append((actual - expected).abs().max() / logits.abs().max().clamp(min=1e-12))
    return torch.stack(differences).max().item()


def make_input(network: nn.Module, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return random images (N, C, H, W) for `shape` (N, H, W); H and W are rounded up to what the encoder supports."""
    divisor = getattr(network.encoder, "size_divisor", 1)
    channels = next(m for m in network.encoder.modules() if isinstance(m, nn.Conv2d)).in_channels
    sides = (round_up(side, divisor) for side in shape[1:])
    return torch.randn(shape[0], channels, *sides, generator=torch.Generator().manual_seed(seed))


def _trace_arguments(network: nn.Module) -> dict:
    """Return keyword arguments for the export functions: the example input and its dynamic dimensions."""
    auto = torch.export.Dim.AUTO
    return {"args": (make_input(network, EXAMPLE_SHAPE),), "dynamic_shapes": {"image": {0: auto, 2: auto, 3: auto}}}


def _write_program(network: nn.Module, path: Path, metadata: dict[str, str]) -> Callable[[Tensor], Tensor]:
    """Write a `torch.export` file and return the program loaded from this file."""
    program = torch.export.export(network, **_trace_arguments(network))
    with open(path, "w+b") as file:
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
        file.seek(0)
        return torch.export.load(file).module()


def _write_onnx(network: nn.Module, path: Path, metadata: dict[str, str]) -> Callable[[Tensor], Tensor]:
    try:
        import onnx
        import onnxruntime  # noqa: F401  (imported only to check that it is installed)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f'{error.name} is not installed; run pip install -e ".[export]"') from None
    options = {"dynamo": True, "opset_version": OPSET, "verbose": False}
    names = {"input_names": ["image"], "output_names": [network.output]}
    model = torch.onnx.export(network, **_trace_arguments(network), **names, **options).model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save_model(model, path)
    exported = OnnxNetwork(path)
    return lambda x: exported.logits({"img_data": x})


def make_metadata(cfg: Config, output: str) -> dict[str, str]:
    """Return metadata for an exported file (input, normalization, output, classes), each as plain text or JSON."""
    metadata = describe_network(cfg, class_table_from_options(cfg.DATASET))
    metadata["output"] = {"logits": "logits (N, C, H, W)", "labels": "class indices (N, H, W)"}[output]
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def main() -> None:
    """Run `python -m mit_semseg.export`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m mit_semseg.export", description=__doc__, formatter_class=formatter)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="file format (default: onnx)")
    parser.add_argument("--output", choices=OUTPUTS, default="logits", help="network output (default: logits)")
    text = "output file (default: network.onnx, .pt2 or .safetensors in DIR)"
    parser.add_argument("--out", metavar="FILE", type=expand_path, help=text)
    text = "also write an ONNX file quantized to 8-bit integers, and print the mean IoU of both ONNX files"
    parser.add_argument("--int8", action="store_true", help=text)
    for name, default, kind in (("calibration", 32, "training"), ("scored", 100, "validation")):
        text = f"with --int8: number of {kind} images to use (default: {default})"
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=text)
    add_verbosity(parser)
    add_config_arguments(parser, DEFAULT_CONFIG)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    setup_logger(0, None, args.level)
    path = Path(args.out or Path(cfg.DIR, f"network{FORMATS[args.format]}"))
    module = build_module(cfg, torch.device("cpu"), checkpoint=cfg.TEST.checkpoint)
    if args.format == "safetensors":
        if args.int8 or args.output != "logits":
            raise ExportError("--format safetensors does not support --int8 and --output labels")
        write_network(module, cfg, class_table_from_options(cfg.DATASET), path)
        print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB): weights, options and classes")
        return
    datasets = _int8_datasets(cfg, args) if args.int8 else None
    options = {"kind": args.format, "output": args.output, "metadata": make_metadata(cfg, args.output)}
    difference = export(module, path, **options)
    shapes = ", ".join("x".join(map(str, make_input(module, shape).shape)) for shape in TEST_SHAPES)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB): maximum output error {difference:.1e} for inputs {shapes}")
    if datasets:
        calibration, validation = datasets
        int8_path = path.with_suffix(f".int8{path.suffix}")
        quantize(path, int8_path, calibration)
        size = int8_path.stat().st_size / 2**20
        print(f"{int8_path} ({size:.1f} MiB): calibrated with {len(calibration)} training images")
        evaluations = evaluate_files([path, int8_path], validation, module.align_corners, inference_options(cfg))
        float32, int8 = (100 * evaluation.summary.mean_iou for evaluation in evaluations)
        print(
            f"mean IoU {float32:.2f} % in float32, {int8:.2f} % in int8 ({int8 - float32:+.2f} points), "
            f"{evaluations[0].images} validation images"
        )


def _int8_datasets(cfg: Config, args: argparse.Namespace) -> tuple[ValDataset, ValDataset]:
    """Check the options for --int8, and return the datasets for calibration and for evaluation."""
    if args.format != "onnx" or args.output != "logits":
        raise ExportError("--int8 requires --format onnx and --output logits")
    for name in ("calibration", "scored"):
        if getattr(args, name) < 1:
            raise ExportError(f"--{name} {getattr(args, name)} is too small; use at least 1 image")
    training = ValDataset(cfg.DATASET.root_dataset, cfg.DATASET.list_train, cfg.DATASET, part=0)
    return training.subsample(args.calibration), build_val_dataset(cfg).subsample(args.scored)
