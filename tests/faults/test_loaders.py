"""Loader processes that die or hang, too little of what they need, and runs that take long.

`STEPS=10000 pytest -s -m long tests/faults/test_loaders.py -k grows` runs as long as the promise says.
"""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, SMALL, Job, here, same, weights, words
from scenes import options, tiny_module, write_data_set
from tqdm import TMonitor

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import MaskedNLLLoss, RunFolder, Settings, build_optimizer, fit

STEPS = int(os.environ.get("STEPS", "400"))
ENV = {**os.environ, "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert here("train.py", "--gpu", "cpu", *words(changes_for(root, folder))).returncode == 0
    return weights(folder, "epoch_1.pth")


def changes_for(root, folder, **changes):
    fixed = {"DATASET.root_dataset": root, "DIR": folder, "TRAIN.num_epoch": 1, "TRAIN.epoch_iters": 16}
    return {**SMALL, **fixed, "TRAIN.disp_iter": 1, "TRAIN.checkpoint_iters": 2, "TRAIN.resume": "auto", **changes}


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "a loader process was killed"),
        pytest.param(signal.SIGSTOP, "a loader process hangs", marks=pytest.mark.long),
    ],
)
def test_a_run_whose_loader_process_dies_or_hangs_ends_and_goes_on(root, tmp_path, undisturbed, number, message):
    """It leaves no process behind, and the same command finishes it."""
    changes = changes_for(root, tmp_path, **{"TRAIN.workers": 1, "RUNTIME.timeout": 4})
    job = Job("train.py", "--gpu", "cpu", *words(changes))
    job.until("Epoch: [1][3/16]")
    below = descendants(job.pid)
    (loader,) = [pid for pid in below if os.getpgid(pid) == pid]  # loader processes have groups of their own
    os.kill(loader, number)
    began = time.perf_counter()
    done = job.end(60)
    assert time.perf_counter() - began < 40
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert all(ended(pid) for pid in below)
    done = here("train.py", "--gpu", "cpu", *words({**changes, "TRAIN.workers": 0}))
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path, "epoch_1.pth"), undisturbed)


DYING = """
import os, sys, time, torch
from mit_semseg.dataset.loader import worker_errors, items, make_loader

class Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        if index == 2:
            time.sleep(8) if sys.argv[1] == "hangs" else os.kill(os.getpid(), int(sys.argv[1]))
        return torch.zeros(1)

loader = make_loader(Dies(), workers=1, timeout=2, batch_size=None)
try:
    with worker_errors():
        for item in items(loader):
            if sys.argv[2] == "busy":  # the worker dies while its items are worked on
                for _ in range(100):
                    time.sleep(0.05)
        list(items(loader))
except Exception as error:
    print(type(error).__name__, error, flush=True)
    os._exit(0)  # PyTorch raises what it hears of its workers at any later moment, too
"""


@pytest.mark.parametrize(
    ("how", "when", "message"),
    [
        # PyTorch does not always say which signal it was.
        (int(signal.SIGBUS), "", r".*shared memory.*docker run --shm-size 8g"),
        (int(signal.SIGKILL), "", r"a loader process was killed .*out of memory"),
        (int(signal.SIGKILL), "busy", r"a loader process was killed .*out of memory"),
        ("hangs", "", r"a loader process hangs .*timed out after 2 seconds"),
    ],
)
def test_a_loader_process_in_trouble_is_explained(how, when, message):
    command = [sys.executable, "-c", DYING, str(how), when]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100)
    assert re.search(f"^LoaderError reading data: {message}", done.stdout), done.stdout + done.stderr


def narrow(before: str, root, folder) -> subprocess.CompletedProcess:
    """train.py after a command of the shell that takes something away."""
    changes = changes_for(root, folder, **{"TRAIN.workers": 2, "RUNTIME.timeout": 30})
    command = [sys.executable, str(ROOT / "train.py"), "--gpu", "cpu", *words(changes)]
    return subprocess.run(
        ["sh", "-c", f'{before} && exec "$@"', "sh", *command], env=ENV, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.long
def test_too_little_shared_memory_is_said(root, tmp_path):
    small = "mount -t tmpfs -o size=8k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk in memory")
    changes = changes_for(root, tmp_path, **{"TRAIN.workers": 1, "RUNTIME.timeout": 30})
    command = [sys.executable, str(ROOT / "train.py"), "--gpu", "cpu", *words(changes)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{small} && exec "$@"', "sh", *command],
        env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "shared memory (/dev/shm) is too small for the loader processes" in done.stderr
    assert "--shm-size" in done.stderr


@pytest.mark.long
def test_too_few_open_files_are_said(root, tmp_path):
    assert narrow("ulimit -S -n 20", root, tmp_path / "soft").returncode == 0  # the limit of this process is raised
    done = narrow("ulimit -n 12", root, tmp_path / "hard")
    assert done.returncode == 2, done.stderr
    assert re.search(r"too many open files: raise the limit \(ulimit -n", done.stderr, re.IGNORECASE), done.stderr


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_however_loader_processes_start(root, tmp_path, undisturbed, method):
    changes = changes_for(root, tmp_path, **{"TRAIN.workers": 2})
    done = Job("train.py", "--gpu", "cpu", *words(changes), start_method=method).end()
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path, "epoch_1.pth"), undisturbed)


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """Notes memory, threads, processes and open files at the end of every epoch."""

    def __init__(self):
        self.seen = []

    def step(self, step, values):
        pass

    def picture(self, epoch, item, prediction):
        pass

    def epoch(self, epoch, history, evaluation):
        files = len(list(Path("/proc/self/fd").iterdir()))
        self.seen.append((resident(), threading.active_count(), len(descendants(os.getpid())), files))


@pytest.mark.long
def test_nothing_grows_in_a_long_run(root, tmp_path):
    """Training, saving and validating again and again, with loader processes."""
    module, watch = tiny_module(crit=MaskedNLLLoss()), Watch()
    optimizer = build_optimizer(module.encoder, module.decoder)
    settings = Settings(
        num_epoch=10, epoch_iters=STEPS // 10, disp_iter=20, eval_epoch=1, workers=2, checkpoint_iters=50
    )
    small = options(imgSizes=(16,), imgMaxSize=32)
    dataset, val = TrainDataset(root, "train", small, 2), ValDataset(root, "val", small)
    threads_before, processes_before = threading.enumerate(), len(descendants(os.getpid()))

    def is_new(thread):
        return thread not in threads_before and not isinstance(thread, TMonitor)  # of tqdm, which keeps one

    fit(
        module, optimizer, dataset.as_uint8(), RunFolder(tmp_path), settings, devices=[torch.device("cpu")],
        val_dataset=val, recorder=watch,
    )  # fmt: skip
    memory, threads, processes, files = zip(*watch.seen, strict=True)
    print(f"{STEPS} steps: resident {memory[2]:.0f} MiB after three epochs, {memory[-1]:.0f} MiB at the end")
    assert max(memory[3:]) - memory[2] < 30
    for counts in (threads, processes, files):
        assert max(counts[3:]) <= max(counts[:3])
    gc.collect()
    deadline = (
        time.monotonic() + 10
    )  # the threads that hand over to loader processes end when they are told to, but soon
    while (left := [thread.name for thread in threading.enumerate() if is_new(thread)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert len(descendants(os.getpid())) <= processes_before
