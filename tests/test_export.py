"""Exported files run without this package, at any image size, with outputs close to those of the network."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, here
from scenes import write_pairs
from test_fuse_bn import randomize_norms
from test_segmenter import PIXELS, folder  # noqa: F401

from mit_semseg import Segmenter
from mit_semseg.cli import export as export_module
from mit_semseg.cli.export import ExportedNetwork, ExportError, compare, export
from mit_semseg.cli.quantize import OnnxNetwork
from mit_semseg.models import ModelBuilder, SegmentationModule


def make_module(encoder, decoder):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=4, in_channels=enc.out_channels, output_stride=8)
    return randomize_norms(SegmentationModule(enc, dec, None)).float()


@pytest.mark.long
def test_torch_export_program_equals_the_network(tmp_path):
    path = tmp_path / "network.pt2"
    module = make_module("resnet18", "ppm_deepsup")
    assert export(module, path, kind="torch_export", metadata={"classes": "[1]"}) < 1e-5
    files = {"metadata.json": ""}
    torch.export.load(path, extra_files=files)
    assert json.loads(files["metadata.json"]) == {"classes": "[1]"}


@pytest.mark.long
def test_onnx_runs_without_this_package(folder, tmp_path):  # noqa: F811
    """Run the code of docs/exporting.md in a process that cannot import the package or PyTorch."""
    pytest.importorskip("onnxruntime", reason="extra `export`")
    path = tmp_path / "quickstart.onnx"
    here("mit_semseg.export", "--cfg", folder / "own.yaml", "--out", path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(), re.DOTALL)
    for name in set(re.findall(r'"(\w+\.png)"', code)):
        Image.fromarray(PIXELS).save(tmp_path / name)
    blocked = "import sys; sys.modules['mit_semseg'] = sys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fractions = dict(re.findall(r"(\w+): ([\d.]+) ?%", done.stdout))
    result = Segmenter.from_config(folder / "own.yaml", opts=["DATASET.imgSizes", "56"], device="cpu")(PIXELS)
    for entry in result.classes:
        assert float(fractions.get(entry["class"], 0)) / 100 == pytest.approx(entry["fraction"], abs=0.03)


def test_file_with_other_outputs_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_write_program", lambda *_: lambda x: torch.zeros(len(x), 4, *x.shape[-2:]))
    with pytest.raises(ExportError, match=r"network\.pt2"):
        export(make_module("resnet18", "c1"), tmp_path / "network.pt2", kind="torch_export", metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_int8_network_is_close_to_float32_in_a_third_of_the_bytes(folder, tmp_path):  # noqa: F811
    """Unreadable calibration images and validation images are skipped."""
    onnx = pytest.importorskip("onnx", reason="extra `export`")
    write_pairs(tmp_path / "data", [(96, 72)] * 6, values=(0, 1, 2))
    (tmp_path / "data" / "images" / "00.png").write_bytes(b"")
    path, int8_path = tmp_path / "network.onnx", tmp_path / "network.int8.onnx"
    done = here("mit_semseg.export", "--cfg", folder / "own.yaml", "--out", path, "--int8", "--calibration", "4",
                "--scored", "3", "DATASET.root_dataset", tmp_path / "data", "DATASET.list_train", ".",
                "DATASET.list_val", ".", "DATASET.on_error", "skip")  # fmt: skip
    assert re.search(r"mean IoU [\d.]+ % in float32, [\d.]+ % in int8 .*, 2 validation images", done.stdout)
    assert done.stdout.count("skipped: ") == 2
    assert int8_path.stat().st_size < 0.35 * path.stat().st_size
    kept = [{entry.key: entry.value for entry in onnx.load(file).metadata_props} for file in (path, int8_path)]
    assert kept[0].items() <= kept[1].items()
    assert "classes" in kept[0]
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "data" / "images" / "05.png")) / 255)
    feed = {"img_data": ((pixels.permute(2, 0, 1)[None] - 0.45) / 0.225).float()}
    float32, int8 = (OnnxNetwork(file).logits(feed) for file in (path, int8_path))
    assert (float32 - int8).norm() / float32.norm() < 0.15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "network.int8.onnx", "network.onnx"]


@pytest.mark.parametrize("words", ["--output labels", "--scored 0", "DATASET.list_train missing"])
def test_invalid_int8_options_are_reported_before_the_export(folder, tmp_path, words):  # noqa: F811
    out = tmp_path / "network.onnx"
    done = here("mit_semseg.export", "--cfg", folder / "own.yaml", "--out", out, "--int8", *words.split(), code=2)
    assert any(word in done.stderr for word in words.split())
    assert not list(tmp_path.iterdir())


def test_labels_output_is_int64_class_indices():
    network = ExportedNetwork(make_module("resnet18", "c1"), "labels").eval()
    labels = network(torch.randn(1, 3, 33, 47))
    assert (labels.shape, labels.dtype) == ((1, 33, 47), torch.int64)
    assert compare(network, network) == 0
    with pytest.raises(ExportError, match="output"):
        compare(network, lambda x: network(x)[:, 1:])
    second = lambda x: network.logits(x).topk(2, dim=1).indices[:, 1]  # noqa: E731
    assert compare(network, second) > 0.1
    torch.nn.init.zeros_(network.decoder.conv_last.weight)
    network.decoder.conv_last.bias.data[:] = torch.tensor([1.0, 1 + 1e-6, 0, 0])
    assert compare(network, second) < 1e-5  # the logits are almost equal


def test_network_with_nan_outputs_is_refused(tmp_path):
    module = make_module("resnet18", "c1")
    torch.nn.init.constant_(module.decoder.conv_last.bias, float("nan"))
    with pytest.raises(ExportError, match="nan"):
        export(module, tmp_path / "a.pt2", kind="torch_export", metadata={})
    assert not list(tmp_path.iterdir())
