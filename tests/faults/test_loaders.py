"""DataLoader workers that crash, hang or lack shared memory, and all start methods."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, Job, here, same, script, small, weights, words
from scenes import write_data_set

ENV = {**os.environ, "OMP_NUM_THREADS": "2"}

FAILING_WORKER = """
import os, sys, time, torch
from mit_semseg.dataset.loader import iterate, make_loader, worker_errors

class FailingDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == int(sys.argv[2]):
            os.kill(os.getpid(), int(sys.argv[1]))
        return torch.zeros(1)

try:
    with worker_errors():
        for item in iterate(make_loader(FailingDataset(), workers=1, timeout=2, batch_size=None)):
            time.sleep(float(sys.argv[3]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("number", "index", "seconds_per_item", "message"),
    [
        # The messages give the probable cause, because PyTorch does not always report the signal.
        (signal.SIGBUS, 2, 0, "shared memory.*--shm-size"),
        (signal.SIGKILL, 2, 0, "killed.*out of memory"),
        (signal.SIGKILL, 2, 5, "killed.*out of memory"),  # killed while the main process uses a batch
        (signal.SIGSTOP, 0, 0, "hangs.*2 seconds"),
    ],
)
def test_failed_worker_raises_loader_error_and_python_exits(number, index, seconds_per_item, message):
    command = [sys.executable, "-c", FAILING_WORKER, *map(str, (int(number), index, seconds_per_item))]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
    assert re.search(f"^LoaderError .*{message}", done.stdout), done.stdout + done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference_weights(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    here("train.py", run_options(root, folder))
    return weights(folder, "epoch_1.pth")


def run_options(root, folder, **changes):
    fixed = {"TRAIN.num_epoch": 1, "TRAIN.epoch_iters": 16, "TRAIN.checkpoint_iters": 2, "TRAIN.resume": "auto"}
    return small(root, folder, **fixed, **changes)


def descendants(pid: int) -> list[int]:
    """Return the IDs of all descendants of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_run_with_a_killed_worker_stops_and_resumes_bit_identically(root, tmp_path, reference_weights):
    job = Job("train.py", run_options(root, tmp_path, TRAIN__workers=1))
    deadline = time.monotonic() + 60
    while not (tmp_path / "resume.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes = descendants(job.pid)
    (worker,) = (pid for pid in processes if os.getpgid(pid) == pid)  # only a worker leads a process group
    os.kill(worker, signal.SIGKILL)
    assert "worker was killed" in job.end(60, code=2).stderr
    assert all(has_ended(pid) for pid in processes)
    here("train.py", run_options(root, tmp_path))
    assert same(weights(tmp_path, "epoch_1.pth"), reference_weights)


@pytest.mark.long
def test_too_little_shared_memory_is_explained(root, tmp_path):
    mount, namespace = "mount -t tmpfs -o size=8k tmpfs /dev/shm", ("unshare", "-rm")
    if subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    train = words(sys.executable, ROOT / "train.py", run_options(root, tmp_path, TRAIN__workers=2, RUNTIME__timeout=30))
    shell = [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh", *train]
    done = subprocess.run(shell, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "--shm-size" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_training_is_bit_identical_for_every_start_method(root, tmp_path, reference_weights, method):
    script("train.py", run_options(root, tmp_path, TRAIN__workers=2), start_method=method)
    assert same(weights(tmp_path, "epoch_1.pth"), reference_weights)
