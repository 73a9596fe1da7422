"""Ranks that are killed, suspended, interrupted, slow or out of memory."""

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
    # Local batch norm is faster, because synchronized batch norm needs about 100 collectives per step.
    fixed = {"TRAIN.checkpoint_iters": 2, "TRAIN.resume": "auto", "MODEL.norm": "batch"}
    return changes_for(root, folder, **{**fixed, **changes})


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for job in start_ranks("train.py", options_for(root, folder)):
        job.end()
    return weights(folder)


def assert_resumes(root, folder, undisturbed):
    """Check that the same command resumes and finishes the run, with exactly the weights of an uninterrupted run."""
    saved = read_resume(RunFolder(folder).resume)["step"]
    first, _ = [job.end() for job in start_ranks("train.py", options_for(root, folder))]
    assert f"resume.pth at step {saved} of 16" in first.stdout
    assert same(weights(folder), undisturbed)
    assert not list(Path(folder).rglob("*.partial"))


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_job(root, tmp_path, undisturbed, victim):
    jobs = start_ranks("train.py", options_for(root, tmp_path))
    jobs[0].until("epoch 1, step 5/8")
    killed = time.perf_counter()
    jobs[victim].send(signal.SIGKILL)
    done = jobs[1 - victim].end(code=2)
    assert time.perf_counter() - killed < 30
    assert re.search(FAILED.format(rank=1 - victim), done.stderr), done.stderr
    jobs[victim].end(code=-signal.SIGKILL)
    if victim == 0:  # rank 0 writes the checkpoints
        assert_resumes(root, tmp_path, undisturbed)


def torchrun(flag, options, step, act):
    """Run train.py with torchrun, call `act(job)` after a step; return the exit code and the output after the call."""
    command = [*TORCHRUN, flag, *words(ROOT / "train.py", options)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        next(line for line in job.stdout if f"epoch 1, step {step}/8" in line)
        act(job)
        output = job.stdout.read()
    return job.returncode, output


@pytest.mark.long
def test_torchrun_restarts_a_job_after_a_killed_rank(root, tmp_path, undisturbed):
    options = options_for(root, tmp_path, TRAIN__resume="off")
    code, output = torchrun("--max-restarts=1", options, 5, lambda job: os.kill(children(job.pid)[-1], signal.SIGKILL))
    assert code == 0, output
    assert re.search(r"resuming .*resume\.pth at step [468] of 16", output)
    assert same(weights(tmp_path), undisturbed)


@pytest.mark.long
def test_sigterm_of_torchrun_saves_the_last_step(root, tmp_path, undisturbed):
    options = options_for(root, tmp_path, TRAIN__checkpoint_iters=0)
    code, output = torchrun("--max-restarts=0", options, 3, lambda job: job.send_signal(signal.SIGTERM))
    assert code != 0
    last = 3 + output.count(", acc ")
    assert read_resume(RunFolder(tmp_path).resume)["step"] == last < 16
    assert_resumes(root, tmp_path, undisturbed)


@pytest.mark.parametrize("receivers", [pytest.param((0,), marks=pytest.mark.long), (1,), (0, 1)])
def test_signal_to_any_rank_stops_all_after_the_same_step(root, tmp_path, undisturbed, receivers):
    # No validation, because a signal during validation stops the run before the next step.
    jobs = start_ranks("train.py", options_for(root, tmp_path, TRAIN__checkpoint_iters=0, TRAIN__eval_epoch=0))
    jobs[0].until("epoch 1, step 3/8")
    for rank in receivers:
        jobs[rank].send(signal.SIGINT)
    first, _ = [job.end(code=130) for job in jobs]
    assert read_resume(RunFolder(tmp_path).resume)["step"] == first.stdout.count(", acc ") < 16
    if len(receivers) == 2:
        assert_resumes(root, tmp_path, undisturbed)


@pytest.mark.long
def test_hanging_rank_ends_the_job_and_the_waiting_stack_is_printed(root, tmp_path):
    changes = options_for(root, tmp_path, TRAIN__epoch_iters=50, RUNTIME__timeout=4, TRAIN__eval_epoch=0)
    waiting, hanging = start_ranks("train.py", changes)
    waiting.until("epoch 1, step 3/50")
    hanging.send(signal.SIGSTOP)
    done = waiting.end(60, code=2)
    hanging.kill()
    assert re.search(FAILED.format(rank=0), done.stderr), done.stderr
    assert re.search(r"(?s)Timeout .*File .*train", done.stderr), done.stderr


class Slow(TrainDataset):
    """A dataset that needs a third of the timeout for a batch, and more than the timeout for four batches."""

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
    jobs = start_ranks("train.py", options_for(root, tmp_path, TRAIN__workers=0))
    jobs[0].until("epoch 1, step 3/8")
    used = int(Path(f"/proc/{jobs[1].pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(jobs[1].pid, resource.RLIMIT_AS, (used, used))
    resource.prlimit(jobs[1].pid, resource.RLIMIT_DATA, (2**20, 2**20))
    first, second = (job.end(code=2) for job in jobs)
    assert re.search(r"error: \[rank 1\] .*out of memory", second.stderr), second.stderr
    assert re.search(FAILED.format(rank=0), first.stderr), first.stderr
    assert_resumes(root, tmp_path, undisturbed)


def test_ranks_with_different_options_do_not_start(root, tmp_path):
    own = {}, {"TRAIN.lr_decoder": 0.5, "DATASET.imgMaxSize": 90}
    expected = "DATASET.imgMaxSize (rank 0: 100, rank 1: 90); TRAIN.lr_decoder (rank 0: 0.01, rank 1: 0.5)"
    for job in start_ranks("train.py", options_for(root, tmp_path), own=own):
        assert expected in job.end(code=2).stderr
    assert not tmp_path.joinpath("log.txt").exists()


RANK = """
import atexit, os, signal
import torch
from mit_semseg.cli import common
from mit_semseg.engine.distributed import join
from mit_semseg.lib.utils import UserError

def main():
    with join([torch.device("cpu")], 8) as world:
        {code}

common.run(main)
"""


def test_rank_stopped_during_validation_is_noticed(tmp_path):
    code = 'world.rank and os.kill(os.getpid(), signal.SIGSTOP); world.gather(None, "validation")'
    (tmp_path / "rank.py").write_text(RANK.format(code=code))
    first, second = start_ranks(str(tmp_path / "rank.py"))
    errors = first.end(60, code=2).stderr
    second.kill()
    assert re.search(FAILED.format(rank=0) + r".*[Rr]anks? 1.*validation", errors), errors


def test_failed_rank_ends_with_its_own_exit_code():
    """The exit code is kept even if the interpreter aborts at exit; `os.abort` simulates this."""
    error = "KeyError('bug') if world.rank else UserError('no such list')"
    code = f"world.gather(None, 'start'); atexit.register(os.abort); raise {error}"
    command, port = [sys.executable, "-c", RANK.format(code=code)], 29400 + os.getpid() % 1000
    jobs = [
        subprocess.Popen(command, env=rank_environment(rank, 2, port), stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for job, code, last_line in zip(jobs, (2, 1), ("error: [rank 0] no such list", "KeyError: 'bug'"), strict=True):
        _, errors = job.communicate(timeout=60)
        assert (job.returncode, errors.splitlines()[-1]) == (code, last_line), errors
