"""Running the scripts, as a user would or in this process."""

import importlib
import importlib.util
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

from mit_semseg.apps import cli

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "DATASET.list_train": "train",
    "DATASET.list_val": "val",
    "DATASET.num_class": 3,
    "DATASET.imgSizes": "(40,48)",
    "DATASET.imgMaxSize": 100,
    "MODEL.arch_encoder": "mobilenetv2dilated",
    "MODEL.arch_decoder": "c1_deepsup",
    "MODEL.pretrained": False,
    "TRAIN.num_epoch": 2,
    "TRAIN.epoch_iters": 3,
    "TRAIN.disp_iter": 2,
    "TRAIN.workers": 0,
    "TRAIN.lr_encoder": 0.01,
    "TRAIN.lr_decoder": 0.01,
    "VAL.checkpoint": "epoch_2.pth",
    "TEST.checkpoint": "epoch_2.pth",
}


def words(options: dict) -> list[str]:
    """Options as the end of a command line."""
    return [str(part) for pair in options.items() for part in pair]


def script(name: str, *arguments, cwd=ROOT, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the top folder in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **kwargs.pop("env", {})}
    command = [sys.executable, str(ROOT / name) if name.endswith(".py") else name, *map(str, arguments)]
    if not name.endswith(".py"):
        command.insert(1, "-m")
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def _load(name: str):
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"script_{name.removesuffix('.py')}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_process(name: str, monkeypatch, *arguments) -> int:
    """Run a script's main function here; returns its exit code (0 for None), its errors come through."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return _load(f"{name}.py").main() or 0


def here(name: str, *arguments) -> subprocess.CompletedProcess:
    """As `script`, in this process: without the seconds that a new interpreter takes to import torch."""
    module, out, err, code = _load(name), io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.run(module.main)
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def weights(folder, suffix="epoch_2.pth") -> dict[str, torch.Tensor]:
    """All entries of encoder and decoder of a run."""
    return {
        f"{part}.{key}": value
        for part in ("encoder", "decoder")
        for key, value in torch.load(Path(folder, f"{part}_{suffix}"), weights_only=True).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
