"""SIGKILL at random moments: nothing of what was saved is lost, and what comes out is as if nothing had happened.

`KILLS=30 pytest tests/faults/test_kills.py` does it more often than the suite.
"""

import os
import random
import signal
import time

import torch
from runs import SMALL, Job, script, weights, words
from runs import same as equal
from scenes import write_data_set

from mit_semseg.engine.checkpoint import RunFiles, read_resume

KILLS = int(os.environ.get("KILLS", "2"))


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path):
    """Also while it starts, saves, validates, and starts its loader processes: any moment is as likely as any other."""
    write_data_set(tmp_path)
    changes = {**SMALL, "DATASET.root_dataset": tmp_path, "TRAIN.epoch_iters": 12, "TRAIN.checkpoint_iters": 3}
    changes |= {"TRAIN.workers": 1, "TRAIN.eval_epoch": 1, "TRAIN.resume": "auto"}
    began = time.perf_counter()
    assert script("train.py", *words({**changes, "DIR": tmp_path / "whole"})).returncode == 0
    lifetime, rng, kills, runs = time.perf_counter() - began, random.Random(0), 0, 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / f"run_{runs}"
        while True:
            job = Job("train.py", *words({**changes, "DIR": folder}))
            ended = waited(job, rng.uniform(0, lifetime) if kills < KILLS else 120)
            if ended:
                break
            job.send(signal.SIGKILL)
            job.end()
            kills += 1
            state = RunFiles(folder).resume
            assert not state.exists() or read_resume(state)["step"] % 3 == 0  # whole, whenever it happened
        assert job.end().returncode == 0, job.errors()
        assert equal(weights(folder), weights(tmp_path / "whole"))
        histories = [torch.load(f / "history_epoch_2.pth", weights_only=True) for f in (folder, tmp_path / "whole")]
        assert histories[0] == histories[1]
        assert not list(folder.rglob("*.partial"))
    print(f"{kills} kills survived in {runs} runs")


def waited(job: Job, seconds: float) -> bool:
    """Whether a job ends within so many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and job.returncode is None:
        time.sleep(0.01)
    return job.returncode is not None
