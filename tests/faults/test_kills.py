"""SIGKILL at random moments: nothing of what was saved is lost, and what comes out is as if nothing had happened.

`KILLS=30 pytest tests/faults/test_kills.py` does it more often than the suite.
"""

import os
import random
import signal
import time

import pytest
import torch
from processes import start_ranks
from runs import SMALL, Job, weights, words
from runs import same as equal
from scenes import write_data_set

from mit_semseg.engine.checkpoint import RunFiles, read_resume

KILLS = int(os.environ.get("KILLS", "2"))


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2], ids=["alone", "two processes"])
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path, count):
    """Also while it starts, saves, validates, and starts its loader processes: any moment is as likely as any other. Of
    two processes any one is killed, and the other ends by itself."""
    write_data_set(tmp_path)
    changes = {**SMALL, "DATASET.root_dataset": tmp_path, "TRAIN.epoch_iters": 6, "TRAIN.checkpoint_iters": 2}
    changes |= {
        "MODEL.norm": "batch",
        "TRAIN.workers": 1,
        "TRAIN.eval_epoch": 1,
        "TRAIN.resume": "auto",
        "TRAIN.timeout": 60,
    }

    def start(folder):
        return start_ranks("train.py", words({**changes, "DIR": folder}), count=count)

    began = time.perf_counter()
    assert [job.end().returncode for job in start(tmp_path / "whole")] == [0] * count
    lifetime, rng, kills, runs = time.perf_counter() - began, random.Random(0), 0, 0
    while kills < (KILLS if count == 1 else (KILLS + 1) // 2):
        runs += 1
        folder = tmp_path / f"run_{runs}"
        while True:
            jobs = start(folder)
            if all_end(jobs, rng.uniform(0, lifetime) if kills < KILLS else 120):
                break
            rng.choice(jobs).send(signal.SIGKILL)
            for job in jobs:
                job.end()
            kills += 1
            state = RunFiles(folder).resume
            assert not state.exists() or read_resume(state)["step"] % 2 == 0  # whole, whenever it happened
        assert [job.end().returncode for job in jobs] == [0] * count, jobs[0].errors()
        assert equal(weights(folder), weights(tmp_path / "whole"))
        histories = [torch.load(f / "history_epoch_2.pth", weights_only=True) for f in (folder, tmp_path / "whole")]
        assert histories[0] == histories[1]
        assert not list(folder.rglob("*.partial"))
    print(f"{kills} kills survived in {runs} runs of {count} processes")


def all_end(jobs: list[Job], seconds: float) -> bool:
    """Whether jobs end within so many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and any(job.returncode is None for job in jobs):
        time.sleep(0.01)
    return all(job.returncode is not None for job in jobs)
