"""DataLoader workers: crashes, timeouts, missing resources, start methods."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, SMALL, Job, here, same, weights, words
from scenes import write_data_set

ENV = {**os.environ, "OMP_NUM_THREADS": "2"}
SAME_THREADS = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other numbers round differently

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
        # PyTorch does not always name the signal.
        (signal.SIGBUS, 2, 0, "shared memory.*--shm-size"),
        (signal.SIGKILL, 2, 0, "killed.*out of memory"),
        (signal.SIGKILL, 2, 5, "killed.*out of memory"),  # while the main process uses a batch
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
    assert here("train.py", "--gpu", "cpu", *words(run_options(root, folder))).returncode == 0
    return weights(folder, "epoch_1.pth")


def run_options(root, folder, **changes):
    fixed = {"DATASET.root_dataset": root, "DIR": folder, "TRAIN.num_epoch": 1, "TRAIN.epoch_iters": 16}
    return {**SMALL, **fixed, "TRAIN.disp_iter": 1, "TRAIN.checkpoint_iters": 2, "TRAIN.resume": "auto", **changes}


def descendants(pid: int) -> list[int]:
    """Return the process IDs of all descendants."""
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
    changes = run_options(root, tmp_path, **{"TRAIN.workers": 1})
    job = Job("train.py", "--gpu", "cpu", *words(changes), env=SAME_THREADS)
    deadline = time.monotonic() + 60
    while not (tmp_path / "resume.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes = descendants(job.pid)
    (worker,) = (pid for pid in processes if os.getpgid(pid) == pid)  # workers have their own process groups
    os.kill(worker, signal.SIGKILL)
    done = job.end(60)
    assert done.returncode == 2
    assert "worker was killed" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(has_ended(pid) for pid in processes)
    done = here("train.py", "--gpu", "cpu", *words({**changes, "TRAIN.workers": 0}))
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path, "epoch_1.pth"), reference_weights)


@pytest.mark.long
def test_too_little_shared_memory_is_explained(root, tmp_path):
    mount, namespace = "mount -t tmpfs -o size=8k tmpfs /dev/shm", ("unshare", "-rm")
    if subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed")
    train = [sys.executable, str(ROOT / "train.py"), "--gpu", "cpu"]
    train += map(str, words(run_options(root, tmp_path, **{"TRAIN.workers": 2, "RUNTIME.timeout": 30})))
    shell = [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh", *train]
    done = subprocess.run(shell, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "--shm-size" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_training_is_bit_identical_for_every_start_method(root, tmp_path, reference_weights, method):
    changes = run_options(root, tmp_path, **{"TRAIN.workers": 2})
    done = Job("train.py", "--gpu", "cpu", *words(changes), start_method=method, env=SAME_THREADS).end()
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path, "epoch_1.pth"), reference_weights)
