"""The notebook runs from top to bottom; the server of the published weights is a folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_segmenter import write_weights

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "DemoSegmenter.ipynb"
NAME = "ade20k-resnet50dilated-ppm_deepsup"
SMALL = "ade20k-resnet18dilated-c1_deepsup"  # in its place: the same lines in less time


@pytest.mark.long
def test_the_notebook_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "it is kept without outputs"
    lines = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert NAME in lines
    lines = lines.replace(NAME, SMALL)
    write_weights(tmp_path / "mirror" / "pytorch" / SMALL, "resnet18dilated", "c1_deepsup", "epoch_20.pth", 150)
    places = {"MIT_SEMSEG_MIRROR": (tmp_path / "mirror").as_uri(), "MIT_SEMSEG_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", lines],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **places, "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu\n")
    assert re.search(r"\(480, 640\) int64; in the middle: \d+, \w+", done.stdout)
    names = sorted(path.name for path in (tmp_path / "segmented").iterdir())
    assert names == ["picture.json", "picture.png", "picture_index.png", "picture_overlay.png"]
