"""Network files: one safetensors file with the weights, options, class names, colors and normalization of a network."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..build import build_module
from ..config import OPTIONS, Config, load_config
from ..dataset import ClassTable
from ..dataset.transforms import CAFFE_MEAN, MEAN, STD
from ..engine.checkpoint import temperature_file
from ..lib.utils import UserError, atomic_write, expand_path
from ..models import SegmentationModule

FORMAT = "mit_semseg network 1"
# Options that `read_network` does not apply, because they concern initial weights and label files
NOT_APPLIED = {
    "DATASET.classes",
    "DATASET.ignore_values",
    "DATASET.label_format",
    "MODEL.pretrained",
    "MODEL.reset_classifier",
}


def describe_network(cfg: Config, table: ClassTable) -> dict[str, object]:
    """Return metadata about input (normalization), classes and architecture of a network."""
    caffe, data = cfg.DATASET.normalization == "caffe", cfg.DATASET
    mean, std = (CAFFE_MEAN, [1, 1, 1]) if caffe else ([255 * value for value in x] for x in (MEAN, STD))
    values = "in units of the training images" if data.mean else "0 to 255"
    return {
        "input": f"images (N, {data.channels}, H, W) float32: (value - mean) / std per channel, values {values}",
        "channels": f"{data.channels} channels" if data.mean else "BGR" if caffe else "RGB",
        "mean": list(data.mean or mean),
        "std": list(data.std or std),
        "classes": list(table.names),
        "colors": table.colors.tolist(),
        "network": f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}",
        "short_sides": np.atleast_1d(cfg.DATASET.imgSizes).tolist(),
    }


def write_network(module: SegmentationModule, cfg: Config, table: ClassTable, path: str | Path) -> None:
    """Write a network file.

    The tensors are named as in the state dicts, after `encoder.` and `decoder.`. The metadata are those of
    `describe_network`, the raw label values of the classes, the version numbers of the layers, the temperature, and all
    options except paths.
    """
    options = {key: cfg.option(key) for key, option in OPTIONS.items() if not option.path}
    metadata = {"format": FORMAT, **describe_network(cfg, table), "raw_values": table.raw.tolist(), "options": options}
    metadata |= {"ignored_value": table.ignored_value, "raw_of_color": list(table.raw_of_color.items())}
    tensors, versions = {}, {}
    for part in ("encoder", "decoder"):
        state = getattr(module, part).state_dict()
        versions |= {f"{part}.{key}": entry for key, entry in state._metadata.items()}
        for key, value in state.items():
            tensors[f"{part}.{key}"] = value.clone(memory_format=torch.contiguous_format)  # must not share memory
    metadata |= {"versions": versions, "temperature": module.temperature}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with atomic_write(path) as partial:
        partial.write_bytes(save(tensors, text))  # files of `save_file` can only be read by their owner
    temperature_file(Path(path)).unlink(missing_ok=True)  # it was fitted to the replaced file


def read_network(path: str | Path, opts: Sequence = ()) -> tuple[SegmentationModule, Config, ClassTable]:
    """Read a network file. Return the network on the CPU, its options and its class table.

    Args:
        path: file written by `write_network`.
        opts: options `[key, value, ...]` that replace those in the file.

    Raises:
        UserError: the file does not exist, is damaged or is not a network file.
    """
    path = Path(expand_path(str(path))).absolute()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"network file {path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a network file of this version ({metadata.get('format', 'no format')}, expected {FORMAT}); "
            f"write one with python -m mit_semseg.export --format safetensors"
        )
    options = json.loads(metadata["options"])  # of this version or an earlier one
    stored = {key: value for key, value in options.items() if key in OPTIONS and key not in NOT_APPLIED}
    cfg = load_config(None, [*(word for setting in stored.items() for word in setting), *opts])
    values = (json.loads(metadata[key]) for key in ("classes", "colors", "raw_values"))
    table = ClassTable.from_raw_values(*values, json.loads(metadata.get("ignored_value", "null")))
    table = replace(table, raw_of_color=dict(json.loads(metadata.get("raw_of_color", "[]"))))
    module = build_module(cfg, torch.device("cpu"), checkpoint=str(path))
    module.decoder.class_names = table.names
    return module, cfg, table
