"""The code of the notebook runs."""

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
SMALL = "ade20k-resnet18dilated-c1_deepsup"  # replaces NAME to save time


@pytest.mark.long
def test_notebook_runs(tmp_path):
    """Random weights in the download cache replace the published ones."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert NAME in code
    write_weights(tmp_path / "cache" / SMALL, "resnet18dilated", "c1_deepsup", "epoch_20.pth", 150)
    environment = {"MIT_SEMSEG_HOME": str(tmp_path / "cache"), "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code.replace(NAME, SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cpu\n")
    assert re.search(r"\(480, 640\) int64; in the center: \d+, \w+", done.stdout)
    names = sorted(path.name for path in (tmp_path / "segmented").iterdir())
    assert names == ["image.json", "image.png", "image_index.png", "image_overlay.png"]
