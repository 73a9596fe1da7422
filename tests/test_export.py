"""Exported files compute what the network computes, at sizes they were not traced at, and without this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import here
from scenes import write_pairs
from test_folding import lively
from test_segmenter import PIXELS, folder  # noqa: F401

from mit_semseg import Segmenter
from mit_semseg.cli import export as exporting
from mit_semseg.cli.export import Exported, ExportError, compare, export
from mit_semseg.cli.quantize import OnnxNetwork
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.layers import POOL_SCALES, average_pool, is_symbolic

ROOT = Path(__file__).resolve().parents[1]


def module_of(encoder, decoder):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=4, in_channels=enc.out_channels, output_stride=8)
    return lively(SegmentationModule(enc, dec, None)).float()


@pytest.mark.long
def test_programs(tmp_path):
    path = tmp_path / "network.pt2"
    assert export(module_of("resnet18", "ppm_deepsup"), path, kind="torch_export", about={"classes": "[1]"}) < 1e-5
    extra = {"about.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["about.json"]) == {"classes": "[1]"}


@pytest.mark.long
def test_onnx_runs_without_this_package(folder, tmp_path):  # noqa: F811
    """The lines of the documentation, in a process that does not know the package."""
    pytest.importorskip("onnxruntime", reason="of the extra `export`")
    path = tmp_path / "quickstart.onnx"
    command = [sys.executable, "-m", "mit_semseg.export", "--cfg", folder / "own.yaml", "--out", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"quickstart\.onnx \(\d+\.\d MiB\): differs by \d\.\de-0\d from the network at 1x3x65x97", done.stdout
    )
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(), re.DOTALL)
    Image.fromarray(PIXELS).save(tmp_path / "picture.png")
    blocked = "import sys; sys.modules['mit_semseg'] = sys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + lines], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shares = dict(re.findall(r"(\w+): ([\d.]+)%", done.stdout))
    own = Segmenter.from_config(folder / "own.yaml", opts=["DATASET.imgSizes", "56"], device="cpu")(PIXELS)
    for entry in own.classes:
        assert float(shares.get(entry["class"], 0)) / 100 == pytest.approx(entry["share"], abs=0.03)


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_load_program", lambda path: lambda x: torch.zeros(len(x), 4, *x.shape[-2:]))
    with pytest.raises(ExportError, match="the torch_export file differs from the network by"):
        export(module_of("resnet18", "c1"), tmp_path / "network.pt2", kind="torch_export", about={})
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_eight_bits(folder, tmp_path):  # noqa: F811
    """Nearly the same label maps from a quarter of the bytes; what the file says of itself is kept."""
    onnx = pytest.importorskip("onnx", reason="of the extra `export`")
    write_pairs(tmp_path / "data", [(96, 72)] * 6, values=(0, 1, 2))
    path, small = tmp_path / "network.onnx", tmp_path / "network.int8.onnx"
    done = here("mit_semseg.export", "--cfg", folder / "own.yaml", "--out", path, "--int8", "--calibration", "4",
                "--scored", "3", "DATASET.root_dataset", tmp_path / "data", "DATASET.list_train", ".",
                "DATASET.list_val", ".")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "calibrated with 4 training pictures" in done.stdout
    assert re.search(r"mean IoU [\d.]+ % in float32, [\d.]+ % in 8 bits .* on 3 validation pictures", done.stdout)
    assert small.stat().st_size < 0.35 * path.stat().st_size
    kept = [{entry.key: entry.value for entry in onnx.load(file).metadata_props} for file in (path, small)]
    assert kept[0].items() <= kept[1].items()
    assert "classes" in kept[0]
    kinds = [node.op_type for node in onnx.load(small).graph.node]
    assert kinds.count("QuantizeLinear") > kinds.count("Conv") / 2
    picture = {"img_data": torch.from_numpy(np.asarray(Image.open(tmp_path / "data" / "images" / "05.png")) / 255)}
    picture["img_data"] = ((picture["img_data"].permute(2, 0, 1)[None] - 0.45) / 0.225).float()
    exact, rounded = (OnnxNetwork(file).logits(picture) for file in (path, small))
    assert (exact - rounded).norm() / exact.norm() < 0.15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "network.int8.onnx", "network.onnx"]


@pytest.mark.long
def test_eight_bits_of_a_set_with_a_broken_picture(folder, tmp_path):  # noqa: F811
    pytest.importorskip("onnx", reason="of the extra `export`")
    write_pairs(tmp_path / "data", [(96, 72)] * 3, values=(0, 1, 2))
    (tmp_path / "data" / "images" / "01.png").write_bytes(b"")
    done = here("mit_semseg.export", "--cfg", folder / "own.yaml", "--out", tmp_path / "network.onnx", "--int8",
                "DATASET.root_dataset", tmp_path / "data", "DATASET.list_train", ".", "DATASET.list_val", ".",
                "DATASET.on_error", "skip", "DATASET.imgSizes", 72)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out: ") == 2
    assert "on 2 validation pictures" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--int8", "--format", "torch_export"], "--int8 goes with --format onnx and --output logits"),
        (["--int8", "--output", "labels"], "--int8 goes with --format onnx and --output logits"),
        (["--int8", "--scored", "0"], "--scored 0: give a number of pictures from 1 up"),
        (["--int8", "DATASET.list_train", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_about_eight_bits(folder, tmp_path, words, message):  # noqa: F811
    done = here("mit_semseg.export", "--cfg", folder / "own.yaml", "--out", tmp_path / "network.onnx", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_labels():
    network = Exported(module_of("resnet18", "c1"), "labels")
    labels = network(torch.randn(1, 3, 33, 47))
    assert labels.shape == (1, 33, 47)
    assert labels.dtype == torch.int64
    assert compare(network, network) == 0
    with pytest.raises(ExportError, match="give"):
        compare(network, lambda x: network(x)[:, 1:])


@pytest.mark.parametrize("bins", POOL_SCALES)
def test_pooling_of_any_size_is_adaptive_pooling(bins):
    """The program of a pooling alone, at sizes the bins do not divide."""

    class Pool(torch.nn.Module):
        def forward(self, x):
            return average_pool(x, bins)

    auto = torch.export.Dim.AUTO
    program = torch.export.export(Pool(), (torch.randn(1, 2, 12, 14),), dynamic_shapes=({2: auto, 3: auto},)).module()
    for size in ((7, 13), (23, 9), (6, 6)):
        x = torch.randn(1, 2, *size)
        np.testing.assert_allclose(program(x), F.adaptive_avg_pool2d(x, bins), atol=1e-5)
    assert not is_symbolic(3, 4)
