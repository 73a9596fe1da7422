"""Ranks that are killed, stopped, slow or out of memory."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ENV, TORCHRUN, changes_for, children, on_ranks, rank_environment, start_ranks, write_images
from runs import ROOT, same, weights, words
from scenes import options
from training import make_trainer

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import RunFolder, World
from mit_semseg.engine.checkpoint import read_resume

FAILED = r"error: \[rank {rank}\] rank {rank} of 2 stopped because another rank ended or timed out"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


def options_for(root, folder, **changes):
    # Norms that are not synchronized: with synchronized ones a step waits a hundred times for the other rank.
    defaults = {"TRAIN.checkpoint_iters": 2, "TRAIN.resume": "auto", "MODEL.norm": "batch"}
    return changes_for(root, folder, **{**defaults, **changes})


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for job in start_ranks("train.py", words(options_for(root, folder))):
        assert job.end().returncode == 0, job.errors()
    return weights(folder)


def assert_resumes(root, folder, undisturbed):
    """The same command finishes the run; the result is that of an undisturbed one bit for bit."""
    saved = read_resume(RunFolder(folder).resume)["step"]
    jobs = start_ranks("train.py", words(options_for(root, folder)))
    ends = [job.end() for job in jobs]
    assert [end.returncode for end in ends] == [0, 0], jobs[0].errors()
    assert f"resume.pth at step {saved} of 16" in ends[0].stdout
    assert same(weights(folder), undisturbed)
    assert not list(Path(folder).rglob("*.partial"))


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_job(root, tmp_path, undisturbed, victim):
    jobs = start_ranks("train.py", words(options_for(root, tmp_path)))
    jobs[0].until("epoch 1, step 5/8")
    killed = time.perf_counter()
    jobs[victim].send(signal.SIGKILL)
    done = jobs[1 - victim].end()
    assert time.perf_counter() - killed < 30
    assert done.returncode == 2
    assert re.search(FAILED.format(rank=1 - victim), done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    jobs[victim].end()
    if victim == 0:  # the rank that writes the files
        assert_resumes(root, tmp_path, undisturbed)


@pytest.mark.long
def test_torchrun_restarts_a_job_after_a_killed_rank(root, tmp_path, undisturbed):
    arguments = ["--gpus", "cpu", *words(options_for(root, tmp_path, **{"TRAIN.resume": "off"}))]
    command = [*TORCHRUN, "--max-restarts=1", str(ROOT / "train.py"), *map(str, arguments)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        for line in job.stdout:
            if "epoch 1, step 5/8" in line:
                break
        os.kill(children(job.pid)[-1], signal.SIGKILL)
        output = job.stdout.read()
    assert job.returncode == 0, output
    assert re.search(r"resuming .*resume\.pth at step [468] of 16", output)
    assert same(weights(tmp_path), undisturbed)


@pytest.mark.long
def test_sigterm_of_torchrun_saves_the_last_step(root, tmp_path, undisturbed):
    arguments = ["--gpus", "cpu", *words(options_for(root, tmp_path, **{"TRAIN.checkpoint_iters": 0}))]
    command = [*TORCHRUN, str(ROOT / "train.py"), *map(str, arguments)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        for line in job.stdout:
            if "epoch 1, step 3/8" in line:
                break
        job.send_signal(signal.SIGTERM)
        output = job.stdout.read()
    assert job.returncode != 0
    last = 3 + output.count(", acc ")
    assert read_resume(RunFolder(tmp_path).resume)["step"] == last < 16
    assert_resumes(root, tmp_path, undisturbed)


@pytest.mark.parametrize("receivers", [(0,), (1,), (0, 1)])
def test_signal_to_any_rank_stops_all_after_the_same_step(root, tmp_path, undisturbed, receivers):
    changes = {"TRAIN.checkpoint_iters": 0, "TRAIN.eval_epoch": 0}  # a validation would stop immediately
    jobs = start_ranks("train.py", words(options_for(root, tmp_path, **changes)))
    jobs[0].until("epoch 1, step 3/8")
    for rank in receivers:
        jobs[rank].send(signal.SIGINT)
    done = [job.end() for job in jobs]
    assert [each.returncode for each in done] == [130, 130], done[0].stderr + done[1].stderr
    assert read_resume(RunFolder(tmp_path).resume)["step"] == done[0].stdout.count(", acc ") < 16
    if len(receivers) == 2:
        assert_resumes(root, tmp_path, undisturbed)


@pytest.mark.long
def test_hanging_rank_ends_the_job_and_the_waiting_stack_is_printed(root, tmp_path):
    changes = options_for(root, tmp_path, **{"TRAIN.epoch_iters": 50, "RUNTIME.timeout": 4, "TRAIN.eval_epoch": 0})
    waiting, hanging = start_ranks("train.py", words(changes))
    waiting.until("epoch 1, step 3/50")
    hanging.send(signal.SIGSTOP)
    done = waiting.end(60)
    hanging.kill()
    assert done.returncode == 2
    assert re.search(FAILED.format(rank=0), done.stderr), done.stderr
    assert re.search(r"(?s)Timeout .*File .*train", done.stderr), done.stderr


class Slow(TrainDataset):
    """Loads each batch in a third of the timeout, all together in more than it."""

    def __getitem__(self, index):
        time.sleep(0.7)
        return super().__getitem__(index)


def _train_slowly(rank, root, folder):
    trainer = make_trainer(folder, world=World(rank, 2, rank, 2, timeout=2.0), num_epoch=1, epoch_iters=4)
    trainer.fit((Slow if rank else TrainDataset)(root, "train", options(), 1))
    return trainer.step


@pytest.mark.long
def test_timeout_applies_to_each_collective(root, tmp_path):
    assert on_ranks(2, tmp_path, _train_slowly, root, tmp_path / "run") == [4, 4]


@pytest.mark.long
def test_rank_out_of_memory_ends_the_job(root, tmp_path, undisturbed):
    jobs = start_ranks("train.py", words(options_for(root, tmp_path, **{"TRAIN.workers": 0})))
    jobs[0].until("epoch 1, step 3/8")
    used = int(Path(f"/proc/{jobs[1].pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(jobs[1].pid, resource.RLIMIT_AS, (used, used))
    resource.prlimit(jobs[1].pid, resource.RLIMIT_DATA, (2**20, 2**20))
    first, second = (job.end() for job in jobs)
    assert (first.returncode, second.returncode) == (2, 2), second.stderr
    assert re.search(r"error: \[rank 1\] .*out of memory", second.stderr), second.stderr
    assert re.search(FAILED.format(rank=0), first.stderr), first.stderr
    assert_resumes(root, tmp_path, undisturbed)


def test_ranks_with_different_options_do_not_start(root, tmp_path):
    own = [(), ("TRAIN.lr_decoder", "0.5", "DATASET.imgMaxSize", "90")]
    for job in start_ranks("train.py", words(options_for(root, tmp_path)), own=own):
        done = job.end()
        assert done.returncode == 2
        assert (
            "DATASET.imgMaxSize (rank 0: 100, rank 1: 90); TRAIN.lr_decoder (rank 0: 0.01, rank 1: 0.5)" in done.stderr
        )
    assert not tmp_path.joinpath("log.txt").exists()


RANK = """
import atexit, os, signal
import torch
from mit_semseg.cli import common
from mit_semseg.engine.distributed import join
from mit_semseg.lib.utils import UserError

def main():
    with join([torch.device("cpu")], 4) as world:
        {code}

common.run(main)
"""


def start_programs(code):
    """Run lines of Python on two ranks."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(code=code)],
            env=rank_environment(rank, 2, 29400 + os.getpid() % 1000),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def test_rank_stopped_during_validation_is_noticed():
    first, second = start_programs(
        'world.rank and os.kill(os.getpid(), signal.SIGSTOP); world.gather(None, "validation")'
    )
    _, errors = first.communicate(timeout=60)
    second.kill()
    second.communicate()
    assert first.returncode == 2
    assert re.search(FAILED.format(rank=0) + r".*[Rr]anks? 1.*validation", errors), errors


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        ("UserError('no such list')", 2, "error: [rank {rank}] no such list"),
        ("KeyError('bug')", 1, "KeyError: 'bug'"),
    ],
)
def test_failed_rank_ends_with_its_own_exit_code(error, code, last_line):
    """Threads of its process groups sometimes abort the interpreter at exit; here `os.abort` stands for them."""
    for rank, job in enumerate(start_programs(f"atexit.register(os.abort); raise {error}")):
        _, errors = job.communicate(timeout=60)
        assert job.returncode == code, errors
        assert errors.splitlines()[-1] == last_line.format(rank=rank)
