"""Writing a trained network to a file that runs without this package.

    python -m mit_semseg.export --cfg config/NAME.yaml --format onnx [--out FILE] [KEY VALUE ...]

The network takes normalized pictures (N, 3, H, W) of any size from 32x32 up, and gives class scores (logits) of the
same size, or with `--output labels` class indices. What one needs to know about pictures and classes is in the file.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..build import build_module, inference_options
from ..config import Config, add_config_arguments, load_config
from ..dataset import ClassTable, ValDataset
from ..dataset.pairs import class_table_of
from ..dataset.transforms import CAFFE_MEAN, MEAN, STD
from ..lib.utils import UserError, atomic_write, expand_path
from ..models.fuse_bn import fuse_batchnorm
from . import quantize
from .common import DEFAULT_CONFIG, add_verbosity, run
from .logs import setup_logger

logger = logging.getLogger(__name__)

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}
OUTPUTS = ("logits", "labels")
OPSET = 18  # of ONNX: the first with antialiased and exact resizing
EXAMPLE = (2, 3, 72, 104)  # a batch to trace with; all but the channels stay free
SHAPES = ((1, 3, 65, 97), (2, 3, 120, 81), (1, 3, 33, 129))  # at which the file is compared with the network
TOLERANCE = 1e-4  # of the largest score


class ExportError(UserError, RuntimeError):
    """A file that was not written; the message says why."""


class Exported(nn.Module):
    """A network as the file has it.

    Args:
        module: a `SegmentationModule`, of which a copy with folded norms is taken.
        output: of `OUTPUTS`.
    """

    def __init__(self, module: nn.Module, output: str = "logits"):
        super().__init__()
        copied = fuse_batchnorm(module).to(memory_format=torch.contiguous_format)
        self.encoder, self.decoder, self.output = copied.encoder, copied.decoder, output

    def forward(self, image: Tensor) -> Tensor:
        """Normalized pictures (N, 3, H, W) -> logits (N, C, H, W), or class indices (N, H, W) int64."""
        logits = self.decoder.head(self.encoder(image, return_feature_maps=True))
        logits = self.decoder.resize(logits, image.shape[-2:])
        return logits.argmax(dim=1) if self.output == "labels" else logits


def export(module: nn.Module, path: Path, *, kind: str, output: str = "logits", about: dict[str, str]) -> float:
    """Write a network to a file, and compare the file with the network before it gets its name.

    Args:
        module: a `SegmentationModule`.
        path: of the file.
        kind: of `FORMATS`.
        output: of `OUTPUTS`.
        about: what is written into the file beside the network, see `description`.

    Returns:
        The largest difference at the shapes it was compared at: of logits relative to the largest, of labels the share
        of pixels that differ.

    Raises:
        ExportError: a package is missing, the exporter fails, or the file computes something else.
    """
    network = Exported(module, output).eval()
    write, load = {"onnx": (_write_onnx, _load_onnx), "torch_export": (_write_program, _load_program)}[kind]
    with atomic_write(path) as partial:
        write(network, partial, about)
        difference = compare(network, load(partial))
        if difference > TOLERANCE:
            raise ExportError(f"the {kind} file differs from the network by {difference:.1e}: it was not kept")
    return difference


@torch.inference_mode()
def compare(network: nn.Module, call: Callable[[Tensor], Tensor]) -> float:
    """The largest difference between a network and what a file computes, over `SHAPES`; see `export`."""
    differences = []
    for seed, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        expected, got = network(x), call(x.clone())
        if got.shape != expected.shape:
            raise ExportError(f"pictures {shape} give {tuple(got.shape)} instead of {tuple(expected.shape)}")
        if expected.is_floating_point():
            differences.append(((got - expected).abs().max() / expected.abs().max()).item())
        else:
            differences.append((got != expected).float().mean().item())
    return max(differences)


def _free_sizes() -> dict:
    auto = torch.export.Dim.AUTO
    return {"image": {0: auto, 2: auto, 3: auto}}


def _program(network: nn.Module) -> torch.export.ExportedProgram:
    example = torch.randn(EXAMPLE, generator=torch.Generator().manual_seed(0))
    return torch.export.export(network, (example,), dynamic_shapes=_free_sizes())


def _write_program(network: nn.Module, path: Path, about: dict[str, str]) -> None:
    with open(path, "wb") as file:
        torch.export.save(_program(network), file, extra_files={"about.json": json.dumps(about)})


def _load_program(path: Path) -> Callable[[Tensor], Tensor]:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(network: nn.Module, path: Path, about: dict[str, str]) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401  (needed for the comparison: better to say so now)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f'{error.name} is not installed: pip install -e ".[export]"') from None
    program = torch.onnx.export(
        network,
        (torch.randn(EXAMPLE, generator=torch.Generator().manual_seed(0)),),
        dynamo=True,
        dynamic_shapes=_free_sizes(),
        input_names=["image"],
        output_names=[network.output],
        opset_version=OPSET,
        verbose=False,
    )
    model = program.model_proto
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save_model(model, path)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def description(cfg: Config, table: ClassTable, output: str) -> dict[str, str]:
    """What whoever runs the file has to know, as JSON values: classes and how pictures are prepared."""
    caffe = cfg.DATASET.normalization == "caffe"
    about = {
        "input": "pictures (N, 3, H, W) float32: (value - mean) / std per channel, values 0 to 255",
        "channels": "BGR" if caffe else "RGB",
        "mean": CAFFE_MEAN if caffe else [255 * value for value in MEAN],
        "std": [1, 1, 1] if caffe else [255 * value for value in STD],
        "output": {"logits": "class scores (N, C, H, W)", "labels": "class indices (N, H, W)"}[output],
        "classes": list(table.names),
        "colors": table.colors.tolist(),
        "network": f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}",
        "short_sides": np.atleast_1d(cfg.DATASET.imgSizes).tolist(),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mit_semseg.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the file (default: onnx)")
    parser.add_argument("--output", choices=OUTPUTS, default="logits", help="of the network (default: logits)")
    parser.add_argument(
        "--out", metavar="FILE", type=expand_path, help="to write (default: network.onnx or network.pt2 in DIR)"
    )
    parser.add_argument("--int8", action="store_true", help="also write the network in 8-bit integers (ONNX)")
    for name, default, what in (
        ("calibration", quantize.CALIBRATION, "training pictures that the ranges of 8-bit values are taken from"),
        ("scored", quantize.SCORED, "validation pictures that the loss in mean IoU is measured on"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"{what} (default: {default})")
    add_verbosity(parser)
    add_config_arguments(parser, DEFAULT_CONFIG)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    setup_logger(0, None, args.level)
    path = Path(args.out or Path(cfg.DIR, f"network{FORMATS[args.format]}"))
    module = build_module(cfg, torch.device("cpu"), checkpoint=cfg.TEST.checkpoint)
    about = description(cfg, class_table_of(cfg.DATASET), args.output)
    data = _data_for(cfg, args) if args.int8 else None
    difference = export(module, path, kind=args.format, output=args.output, about=about)
    sizes = ", ".join("x".join(map(str, shape)) for shape in SHAPES)
    print(f"{path} ({_mebibytes(path)}): differs by {difference:.1e} from the network at {sizes}")
    if data:
        small = path.with_suffix(f".int8{path.suffix}")
        quantize.quantize(path, small, data[0])
        print(f"{small} ({_mebibytes(small)}): calibrated with {len(data[0])} training pictures")
        print(quantize.cost(path, small, data[1], align_corners=module.align_corners, view=inference_options(cfg)))


def _mebibytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def _data_for(cfg: Config, args: argparse.Namespace) -> tuple[ValDataset, ValDataset]:
    """Pictures to calibrate with and to score on: what is wrong with them is said before anything is written."""
    if args.format != "onnx" or args.output != "logits":
        raise ExportError("--int8 goes with --format onnx and --output logits")
    for name in ("calibration", "scored"):
        if getattr(args, name) < 1:
            raise ExportError(f"--{name} {getattr(args, name)}: give a number of pictures from 1 up")
    training, validation = quantize.labelled_pictures(cfg)
    return training.subsample(args.calibration), validation.subsample(args.scored)


if __name__ == "__main__":
    run(main)
