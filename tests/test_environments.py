"""The package runs in notebooks, services and containers, and changes no state of the calling program."""

import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from runs import load_script, script, small, words
from scenes import options, tiny_module, write_data_set
from training import run

from mit_semseg import Segmenter
from mit_semseg.cli import common
from mit_semseg.dataset import ValDataset, class_table
from mit_semseg.evaluation import InferenceOptions, Predictor, evaluate
from mit_semseg.evaluation.evaluator import LoadOptions
from mit_semseg.lib.nn.scatter import as_device
from mit_semseg.lib.utils import progress_bar

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend"])
def test_training_ignores_the_plot_backend_of_a_notebook(root, tmp_path, backend):
    done = script("train.py", small(root, tmp_path / "run", TRAIN__num_epoch=1), env={"MPLBACKEND": backend})
    assert (tmp_path / "run" / "curves.png").is_file()
    assert "WARNING" not in done.stdout


class WriteOnly:
    """An output stream with no method but `write` and `flush`, as in programs that show output in a window."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("make_stream", [lambda: None, WriteOnly])
def test_scripts_run_without_a_terminal(root, tmp_path, make_stream):
    arguments = words(small(root, tmp_path, TRAIN__num_epoch=1))
    out, errors = make_stream(), make_stream()
    for name, code in (("train.py", 0), ("train.py", 2), ("test.py", 2)):
        module = load_script(name)
        with (
            mock.patch.multiple(sys, argv=[name, *arguments], stdout=out, stderr=errors),
            pytest.raises(SystemExit) as end,
        ):
            common.run(module.main)
        assert (end.value.code or 0) == code
    if errors:
        assert "training is complete" in out.text
        assert "TRAIN.resume auto" in errors.text


def test_tools_escape_characters_that_the_terminal_lacks(tmp_path):
    """Class names and file names contain characters that ASCII and cp1252 lack."""
    data = tmp_path / "дата"
    options = {"DATASET.root_dataset": data, "DATASET.list_train": "training", "DATASET.list_val": "validation"}
    options |= {"DATASET.classes": "[sky, grass, 道路, house, tree, car, sun]", "DATASET.ignore_values": "[7]"}
    for tool, encoding, arguments in (
        ("synthetic", "ascii", [data, "--train", 2, "--val", 2, "--size", "48x32"]),
        ("doctor", "cp1252", ["DATASET.num_class", 7, options]),
    ):
        command = words(sys.executable, "-m", f"mit_semseg.dataset.{tool}", *arguments)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done
    assert rb"\u9053\u8def" in done.stdout


def test_progress_bars_do_not_depend_on_the_log_level_of_the_program(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    logging.getLogger("mit_semseg").addHandler(handler)
    assert not progress_bar(range(3)).disable
    assert progress_bar(range(3), shown=False).disable


def test_models_and_datasets_work_without_opencv(tmp_path):
    """If OpenCV cannot load libGL, as in many containers, the error says what to install."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code = """
import torch
import mit_semseg.models, mit_semseg.dataset, mit_semseg.config, mit_semseg.engine, mit_semseg.utils
from mit_semseg.dataset import TrainDataset
from mit_semseg.models import ModelBuilder
ModelBuilder.build_decoder("c1", fc_dim=8)
from mit_semseg.cli import common
from mit_semseg.evaluation.label_map import label_map_from_logits
common.run(lambda: label_map_from_logits([torch.zeros(2, 4, 4)], (8, 8)))
"""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "opencv-python-headless" in done.stderr
    assert "libGL.so.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_device_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    names = ("0", 1, "cuda:2", "cuda", torch.device("cuda"), "cpu")
    assert [str(as_device(d)) for d in names] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:3", "cpu"]


def test_library_changes_no_global_state(root, tmp_path):
    def state():
        return {
            "OpenCV threads": cv2.getNumThreads(),
            "threads": torch.get_num_threads(),
            "excepthook": threading.excepthook,
            "dtype": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "gradient": torch.is_grad_enabled(),
            "log": (logging.getLogger().handlers, logging.getLogger().level, logging.getLogger("mit_semseg").level),
            "backend": matplotlib.rcParams._get("backend"),
            "working directory": os.getcwd(),
        }

    cv2.setNumThreads(2)
    before = state()
    run(root, tmp_path)
    evaluate(
        Predictor(tiny_module()), ValDataset(root, "val", options()), progress=False, loading=LoadOptions(workers=0)
    )
    image = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    for flip in (False, True):
        inference = InferenceOptions(flip=flip)
        result = Segmenter(tiny_module(), class_table("", 3), options(), inference=inference)(image)
        result.overlay()
    result.save(tmp_path / "a", [".png", "_index.png"])
    assert state() == before


SEGMENT = """
import torch, numpy as np
torch.set_num_threads(1)
from mit_semseg import Segmenter
from mit_semseg.dataset import class_table
from mit_semseg.models import ModelBuilder, SegmentationModule
from types import SimpleNamespace
encoder = ModelBuilder.build_encoder("mobilenetv2dilated", pretrained=False)
module = SegmentationModule(encoder, ModelBuilder.build_decoder("c1", fc_dim=320, num_class=3), None)
options = SimpleNamespace(imgSizes=(40, 48), imgMaxSize=100, padding_constant=8)
Segmenter(module, class_table("", 3), options)(np.zeros((48, 64, 3), np.uint8)).overlay()
"""
TRAIN = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from scenes import options, tiny_module
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import MaskedNLLLoss, RunFolder, Trainer, TrainingOptions, World, build_optimizer
if __name__ == "__main__":
    torch.set_num_threads(1)
    module, data = tiny_module(crit=MaskedNLLLoss()), Path(sys.argv[1])
    training = TrainingOptions(num_epoch=1, epoch_iters=2, eval_epoch=1, workers=1)
    optimizer, world = build_optimizer(module.encoder, module.decoder), World(devices=[torch.device("cpu")] * 2)
    trainer = Trainer(module, optimizer, RunFolder(sys.argv[3]), training, world)
    trainer.fit(TrainDataset(data, "train", options()), ValDataset(data, "val", options()))
"""


@pytest.mark.long
@pytest.mark.parametrize("code", [SEGMENT, TRAIN], ids=["segment", "train"])
def test_short_programs_end_cleanly_on_busy_cores(root, tmp_path, code):
    """Run five programs at once. A package thread that runs after the interpreter has ended would crash a program."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", code, root, ROOT / "tests", tmp_path / str(number)] for number in range(5)]
    started = [subprocess.Popen(list(map(str, c)), env=env, stderr=subprocess.PIPE) for c in commands]
    assert [(p.communicate(timeout=180)[1], p.returncode) for p in started] == [(b"", 0)] * 5
