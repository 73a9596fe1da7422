"""The package in programs and on machines of every kind: notebooks, services, terminals, containers, clusters."""

import copy
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
import torch.distributed as dist
from near import assert_near
from runs import SMALL, here, load_script, script, words
from scenes import options, tiny_module, write_data_set
from test_training import run
from torch import nn

from mit_semseg import Segmenter, build
from mit_semseg.cli import common
from mit_semseg.cli.plots import _writable, save_curves
from mit_semseg.cli.run_logger import RunLogger
from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset, class_table
from mit_semseg.evaluation import evaluate
from mit_semseg.evaluation.network import InferenceOptions, prepared
from mit_semseg.lib.nn import ProcessGroupError, convert_sync_batchnorm
from mit_semseg.lib.nn.scatter import as_device
from mit_semseg.lib.nn.sync_stats import _collective
from mit_semseg.lib.utils import UserError, progress_bar
from mit_semseg.models.pretrained import cache_dir

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def program(code: str, *, cwd, **environment) -> subprocess.CompletedProcess:
    """Run a program of a few lines in a new interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


# Plots


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend"])
def test_training_survives_the_plot_settings_of_a_notebook(root, tmp_path, backend):
    changes = words({**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path / "run", "TRAIN.num_epoch": 1})
    done = script("train.py", "--gpu", "cpu", *changes, env={"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    assert "training is complete" in done.stdout
    assert (tmp_path / "run" / "curves.png").is_file()
    assert "cannot be drawn" not in done.stdout


def test_a_plot_that_fails_is_logged(tmp_path, caplog):
    recorder = RunLogger(str(tmp_path), class_table("", 3))
    recorder.epoch(1, {"train": {"epoch": [1], "loss": [1, 2], "acc": [1]}}, None)
    assert "curves.png cannot be drawn: ValueError" in caplog.text


def test_names_in_any_script_can_be_drawn(tmp_path, caplog):
    names, fonts = _writable(["road", "道路", "дорога"])
    assert (names[0], names[2]) == ("road", "дорога")
    assert names[1] == "道路" if len(fonts) > 1 else names[1] == r"\u9053\u8def"
    points = {"epoch": [0.5, 1.0], "loss": [2.0, 1.0], "acc": [0.3, 0.6]}
    with matplotlib.rc_context({"backend": "agg"}):
        save_curves({"train": points}, tmp_path / "c.png")
    assert not caplog.records


# Streams


class Plain:
    """A stream of a program that shows text in a window: it has `write` alone."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [lambda: None, Plain])
def test_without_a_terminal(root, tmp_path, stream):
    changes = words({**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path, "TRAIN.num_epoch": 1})
    out, errors = stream(), stream()
    for name, code in (("train.py", 0), ("train.py", 2), ("test.py", 2)):  # a run, and two mistakes
        module, argv = load_script(name), [name, "--gpu", "cpu", *changes]
        with (
            mock.patch.multiple(sys, argv=argv, stdout=out, stderr=errors),
            pytest.raises(SystemExit) as end,
        ):
            common.run(module.main)
        assert (end.value.code or 0) == code
    if errors:
        assert "training is complete" in out.text
        assert "already holds a run" in errors.text


def test_tools_on_a_terminal_of_few_letters(tmp_path):
    """The names of classes and files have letters that it does not show."""
    data = tmp_path / "дата"
    done = [
        subprocess.run(
            [sys.executable, "-m", f"mit_semseg.dataset.{tool}", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
            cwd=tmp_path,
            capture_output=True,
        )
        for tool, encoding, arguments in (
            ("synthetic", "ascii", [data, "--train", 2, "--val", 2, "--size", "48x32"]),
            ("doctor", "cp1252", words({
                "DATASET.root_dataset": data, "DATASET.list_train": "training", "DATASET.list_val": "validation",
                "DATASET.num_class": 7, "DATASET.classes": "[sky, grass, 道路, house, tree, car, sun]",
                "DATASET.ignore_values": "[7]",
            })),
        )
    ]  # fmt: skip
    assert [d.returncode for d in done] == [0, 0], done
    assert rb"\u9053\u8def" in done[1].stdout


def test_progress_bars_are_not_the_business_of_a_callers_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    logging.getLogger("mit_semseg").addHandler(handler)
    assert not progress_bar(range(3)).disable
    assert progress_bar(range(3), shown=False).disable


# Libraries that are missing, and homes


def test_without_opencv(tmp_path):
    """Whose own error, in a container without libGL, names a file that nobody knows."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code = """
import torch
import mit_semseg.models, mit_semseg.dataset, mit_semseg.config, mit_semseg.engine, mit_semseg.utils
from mit_semseg.dataset import TrainDataset
from mit_semseg.models import ModelBuilder
ModelBuilder.build_decoder("c1", fc_dim=8)
from mit_semseg.cli import common as cli
from mit_semseg.evaluation.label_map import label_map_from_logits
common.run(lambda: label_map_from_logits([torch.zeros(2, 4, 4)], (8, 8)))
"""
    done = program(code, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2, done.stderr
    assert "opencv-python-headless" in done.stderr
    assert "libGL.so.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="asks the system's list of users")
def test_a_user_without_a_home(monkeypatch, caplog, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME", "MIT_SEMSEG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError("uid not found: 12345")))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_dir() == tmp_path / "mit_semseg"
    assert "MIT_SEMSEG_HOME" in caplog.text
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_resuming_needs_no_initial_weights(root, tmp_path):
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path / "a", "TRAIN.num_epoch": 1}
    assert here("train.py", "--gpu", "cpu", *words(changes)).returncode == 0
    initial = tmp_path / "encoder.pth"
    initial.write_bytes((tmp_path / "a" / "encoder_epoch_1.pth").read_bytes())
    changes |= {"DIR": tmp_path / "b", "MODEL.weights_encoder": initial}
    assert here("train.py", "--gpu", "cpu", *words(changes)).returncode == 0
    initial.unlink()
    done = here("train.py", "--gpu", "cpu", *words({**changes, "TRAIN.num_epoch": 2, "TRAIN.resume": "auto"}))
    assert done.returncode == 0, done.stderr


def test_another_model_or_optimizer_is_named_in_a_line(root, tmp_path):
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path, "TRAIN.num_epoch": 1}
    assert here("train.py", "--gpu", "cpu", *words(changes)).returncode == 0
    changes |= {"TRAIN.resume": "auto", "TRAIN.num_epoch": 2}
    own = "mobilenetv2dilated + c1_deepsup"
    for change, saved, now in (
        ({"MODEL.arch_decoder": "c1"}, f"{own}, 3 classes", "mobilenetv2dilated + c1, 3 classes"),
        ({"DATASET.num_class": 4}, f"{own}, 3 classes", f"{own}, 4 classes"),
        ({"TRAIN.optim": "AdamW"}, "SGD of", "AdamW of"),
        ({"TRAIN.fix_bn": True}, "SGD of", "SGD of"),
    ):
        done = here("train.py", "--gpu", "cpu", *words({**changes, **change}))
        assert done.returncode == 2
        assert f"saved: {saved}" in done.stderr
        assert f"now: {now}" in done.stderr
        assert len(done.stderr) < 500


# Errors of processes and devices


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_own_errors_in_a_synchronized_norm_stay_what_they_are(error):
    def fail():
        raise error

    with pytest.raises(type(error)) as caught:
        _collective(fail, None, "bn1")
    assert caught.value is error


@pytest.mark.parametrize("error", [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error"),
])  # fmt: skip
def test_errors_of_the_exchange_are_translated(error, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)

    def fail():
        raise error

    with pytest.raises(ProcessGroupError, match="bn1: process 1 of 2 waited"):
        _collective(fail, None, "bn1")


def test_a_norm_with_a_process_group_can_be_copied():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        module = convert_sync_batchnorm(tiny_module(), process_group=group).eval()
        copied = copy.deepcopy(module)
        norms = [[m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in (module, copied)]
        assert all(a is not b and b.process_group is group for a, b in zip(*norms, strict=True))
        x = {"img_data": torch.randn(1, 3, 32, 32)}
        with torch.no_grad():
            expected = module(x, segSize=(32, 32))
            for network in (copied, prepared(module)):
                assert_near(network(x, segSize=(32, 32)), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("old", [True, False])
def test_strict_float32_changes_nothing_else_and_restores_what_it_found(old, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", True)
    if old or not hasattr(cudnn, "conv"):
        switch, name, values = cudnn, "allow_tf32", (True, False)
    else:
        switch, name, values = cudnn.conv, "fp32_precision", ("tf32", "ieee")
    before = getattr(switch, name)
    try:
        for value in values:
            setattr(switch, name, value)
            with InferenceOptions(precision="fp32").arithmetic("cuda"):
                assert cudnn.benchmark
                assert cudnn.deterministic
                if hasattr(cudnn, "conv"):
                    assert cudnn.conv.fp32_precision == "ieee"
            assert getattr(switch, name) == value
    finally:
        setattr(switch, name, before)


def test_devices_by_any_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    given = ("0", 1, "cuda:2", "cuda", torch.device("cuda"), "cpu")
    assert [str(as_device(d)) for d in given] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:3", "cpu"]


def test_what_a_device_cannot_do_is_refused_before_training(monkeypatch):
    cfg = load_config(None, ["MODEL.norm", "inplace"])
    with pytest.raises(UserError, match=r"MODEL\.norm inplace .* mps"):
        build.build_module(cfg, torch.device("mps"))
    cfg = load_config(None, ["TRAIN.amp", "bf16"])
    monkeypatch.setattr("mit_semseg.build.lacks_bfloat16", lambda device: True)
    with pytest.raises(UserError, match=r"TRAIN\.amp bf16: cuda:0 .* fp16"):
        build.build_module(cfg, torch.device("cuda:0"))
    monkeypatch.setattr("mit_semseg.evaluation.network.lacks_bfloat16", lambda device: True)
    with pytest.raises(UserError, match=r"INFERENCE\.precision bf16: cuda:0"):
        prepared(tiny_module(), "cuda:0", precision="bf16")


# Side effects


def test_nothing_of_the_program_around_is_changed(root, tmp_path):
    def state():
        return {
            "OpenCV threads": cv2.getNumThreads(),
            "threads": torch.get_num_threads(),
            "hook": threading.excepthook,
            "type": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "gradient": torch.is_grad_enabled(),
            "log": (logging.getLogger().handlers, logging.getLogger().level, logging.getLogger("mit_semseg").level),
            "backend": matplotlib.rcParams._get("backend"),
            "working folder": os.getcwd(),
        }

    cv2.setNumThreads(2)
    before = state()
    run(root, tmp_path)
    val = ValDataset(root, "val", options())
    evaluate(tiny_module(), val, progress=False, workers=0)
    picture = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    few = Segmenter(tiny_module(), class_table("", 3), options())
    for flip in (False, True):
        Segmenter(tiny_module(), class_table("", 3), options(), view=InferenceOptions(flip=flip))(picture).overlay()
    few(picture).save(tmp_path / "a", [".png", "_index.png"])
    assert state() == before


SEGMENTING = """
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
TRAINING = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from scenes import options, tiny_module
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import MaskedNLLLoss, RunFolder, Settings, build_optimizer, fit
if __name__ == "__main__":
    torch.set_num_threads(1)
    module, data = tiny_module(crit=MaskedNLLLoss()), Path(sys.argv[1])
    settings = Settings(num_epoch=1, epoch_iters=2, eval_epoch=1, workers=1, timeout=60)
    val, devices = ValDataset(data, "val", options()), [torch.device("cpu")] * 2
    folder = RunFolder(sys.argv[3])
    train, optimizer = TrainDataset(data, "train", options()), build_optimizer(module.encoder, module.decoder)
    fit(module, optimizer, train, folder, settings, devices=devices, val_dataset=val)
"""


@pytest.mark.long
@pytest.mark.parametrize("code", [SEGMENTING, TRAINING], ids=["segmenting", "training"])
def test_short_programs_end_cleanly_on_busy_cores(root, tmp_path, code):
    """Several at once: no thread of the package outlives the interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", code, root, ROOT / "tests", tmp_path / str(number)] for number in range(5)]
    started = [subprocess.Popen(list(map(str, c)), env=env, stderr=subprocess.PIPE) for c in commands]
    assert [(p.communicate(timeout=180)[1], p.returncode) for p in started] == [(b"", 0)] * 5


def test_a_replica_that_fails_ends_the_program_with_its_error(tmp_path):
    code = """
import torch
from mit_semseg.lib.nn import UserScatteredDataParallel
module = UserScatteredDataParallel(torch.nn.Linear(4, 2), device_ids=["cpu", "cpu"])
module([torch.randn(3, 4), torch.randn(5, 3)])
"""
    done = program(code, cwd=tmp_path)
    assert done.returncode == 1
    assert "shapes cannot be multiplied" in done.stderr
