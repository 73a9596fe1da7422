"""Runs that are killed at random moments and resumed have exactly the weights of an uninterrupted run.

`KILLS=30 pytest -s -m long tests/faults/test_kills.py` kills every kind of job 30 times instead of twice.
"""

import os
import random
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from ranks import ENV, TORCHRUN, children, start_ranks
from runs import ROOT, same, small, weights, words
from scenes import write_data_set

from mit_semseg.engine.checkpoint import RunFolder, read_resume

KILLS = int(os.environ.get("KILLS", "2"))


class OneRank:
    """A training job with one rank."""

    count = 1

    def __init__(self, options):
        self.jobs = start_ranks("train.py", options, count=self.count)

    def running(self) -> bool:
        return any(job.returncode is None for job in self.jobs)

    def kill_one(self, rng: random.Random) -> None:
        rng.choice(self.jobs).send(signal.SIGKILL)

    def end(self) -> bool:
        """Wait until all ranks have ended; return whether all exit codes are 0."""
        return [job.end(code=None).returncode for job in self.jobs] == [0] * self.count

    def errors(self) -> str:
        return "\n".join(job.errors() for job in self.jobs)


class TwoRanks(OneRank):
    """A training job with two ranks; if one is killed, the other must end with an error."""

    count = 2


class Torchrun:
    """A training job with two ranks started by torchrun; `kill_one` kills one rank or all processes."""

    def __init__(self, options):
        command = [*TORCHRUN, *words(ROOT / "train.py", options)]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (for as long as the job)
        self.job = subprocess.Popen(command, env=ENV, stdout=self.output, stderr=subprocess.STDOUT)

    def running(self) -> bool:
        return self.job.poll() is None

    def kill_one(self, rng: random.Random) -> None:
        with suppress(ProcessLookupError):
            self.job.send_signal(signal.SIGSTOP)  # torchrun must not start processes while its children are listed
            below = children(self.job.pid)
            if below and rng.random() < 0.7:
                os.kill(rng.choice(below), signal.SIGKILL)
                self.job.send_signal(signal.SIGCONT)
                return
        for pid in (*(child for each in below for child in children(each)), *below, self.job.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> bool:
        return self.job.wait(200) == 0

    def errors(self) -> str:
        self.output.seek(0)
        return self.output.read()


@pytest.mark.long
@pytest.mark.parametrize("kind", [OneRank, TwoRanks, Torchrun])
def test_run_killed_again_and_again_gives_the_undisturbed_result(tmp_path, kind):
    """The times of the kills are uniformly distributed over start-up, training, saving and validation."""
    write_data_set(tmp_path)
    changes = {"TRAIN.epoch_iters": 6, "TRAIN.checkpoint_iters": 2, "TRAIN.workers": 1, "TRAIN.eval_epoch": 1}
    changes |= {"TRAIN.resume": "auto", "MODEL.norm": "batch", "RUNTIME.timeout": 60}

    def start(folder):
        return kind(small(tmp_path, folder, **changes))

    began = time.perf_counter()
    assert start(tmp_path / "whole").end()
    lifetime, rng, kills, runs = time.perf_counter() - began, random.Random(0), 0, 0
    while kills < KILLS:
        runs += 1
        folder, reached = tmp_path / f"run_{runs}", 0
        while True:
            job = start(folder)
            if ended(job, rng.uniform(0, lifetime) if kills < KILLS else 120):
                break
            job.kill_one(rng)
            kills += 1
            if job.end():
                break  # the job ended before it was killed
            for path in folder.glob("*.pth"):
                torch.load(path, weights_only=True)  # fails if the file is truncated
            state = RunFolder(folder).resume
            step = read_resume(state)["step"] if state.exists() else 0
            assert step >= reached
            assert step % 2 == 0
            reached = step
        assert job.end(), job.errors()
        assert same(weights(folder), weights(tmp_path / "whole"))
        histories = [torch.load(f / "history_epoch_2.pth", weights_only=True) for f in (folder, tmp_path / "whole")]
        assert histories[0] == histories[1]
        assert not list(Path(folder).rglob("*.partial"))
    print(f"{kind.__name__}: {kills} kills, {runs} completed runs with the expected weights")


def ended(job, seconds: float) -> bool:
    """Return whether a job ends within this number of seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and job.running():
        time.sleep(0.01)
    return not job.running()
