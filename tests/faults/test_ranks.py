"""Processes of a job that are killed, stopped, slow, out of memory or others, and a network that is cut."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import (
    ENV,
    TORCHRUN,
    changes_for,
    children,
    free_port,
    in_processes,
    rank_environment,
    start_ranks,
    write_pictures,
)
from runs import ROOT, same, weights, words
from scenes import options, tiny_module

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import MaskedNLLLoss, Processes, RunFolder, Settings, build_optimizer, fit
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.distributed import Place

BROKEN = r"error: \[rank {rank}\] .*process {other} of 2 ended or does not answer, so this one .* cannot go on"


def started(*commands):
    """Python with arguments, one process of a job for each; where the code is, and the arguments."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**rank_environment(rank, len(commands), port), "PYTHONPATH": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (place, *arguments) in enumerate(commands)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"))


def options_for(root, folder, **changes):
    # Norms of every process alone: a step of synchronized ones waits a hundred times for the other process.
    own = {"TRAIN.checkpoint_iters": 2, "TRAIN.resume": "auto", "MODEL.norm": "batch"}
    return changes_for(root, folder, **{**own, **changes})


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for job in start_ranks("train.py", words(options_for(root, folder))):
        assert job.end().returncode == 0, job.errors()
    return weights(folder)


def goes_on(root, folder, undisturbed):
    """The same command finishes the run as if nothing had happened."""
    saved = read_resume(RunFolder(folder).resume)["step"]
    jobs = start_ranks("train.py", words(options_for(root, folder)))
    ends = [job.end() for job in jobs]
    assert [end.returncode for end in ends] == [0, 0], jobs[0].errors()
    assert f"resume.pth at step {saved} of 16" in ends[0].stdout
    assert same(weights(folder), undisturbed)
    assert not list(Path(folder).rglob("*.partial"))


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job(root, tmp_path, undisturbed, victim):
    jobs = start_ranks("train.py", words(options_for(root, tmp_path)))
    jobs[0].until("Epoch: [1][5/8]")
    killed = time.perf_counter()
    jobs[victim].send(signal.SIGKILL)
    done = jobs[1 - victim].end()
    assert time.perf_counter() - killed < 30
    assert done.returncode == 2
    assert re.search(BROKEN.format(rank=1 - victim, other=victim) if victim else "cannot go on", done.stderr), (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    jobs[victim].end()
    if victim == 0:  # who writes the files
        goes_on(root, tmp_path, undisturbed)


@pytest.mark.long
def test_torchrun_restarts_a_job_that_a_process_was_killed_of(root, tmp_path, undisturbed):
    arguments = ["--gpus", "cpu", *words(options_for(root, tmp_path, **{"TRAIN.resume": "off"}))]
    command = [*TORCHRUN, "--max-restarts=1", str(ROOT / "train.py"), *map(str, arguments)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        for line in job.stdout:
            if "Epoch: [1][5/8]" in line:
                break
        os.kill(children(job.pid)[-1], signal.SIGKILL)
        output = job.stdout.read()
    assert job.returncode == 0, output
    assert re.search(r"continuing .*resume\.pth at step [468] of 16", output)
    assert same(weights(tmp_path), undisturbed)


@pytest.mark.long
def test_torchrun_s_sigterm_saves_the_last_step(root, tmp_path, undisturbed):
    """As when a machine is taken back: torchrun passes the signal on."""
    arguments = ["--gpus", "cpu", *words(options_for(root, tmp_path, **{"TRAIN.checkpoint_iters": 0}))]
    command = [*TORCHRUN, str(ROOT / "train.py"), *map(str, arguments)]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        for line in job.stdout:
            if "Epoch: [1][3/8]" in line:
                break
        job.send_signal(signal.SIGTERM)
        output = job.stdout.read()
    assert job.returncode != 0
    last = 3 + output.count("Accuracy")
    assert read_resume(RunFolder(tmp_path).resume)["step"] == last < 16
    goes_on(root, tmp_path, undisturbed)


@pytest.mark.parametrize("heard", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_process_ends_all_after_the_same_step(root, tmp_path, undisturbed, heard):
    changes = {"TRAIN.checkpoint_iters": 0, "TRAIN.eval_epoch": 0}  # a validation would end at once
    jobs = start_ranks("train.py", words(options_for(root, tmp_path, **changes)))
    jobs[0].until("Epoch: [1][3/8]")
    for rank in heard:
        jobs[rank].send(signal.SIGINT)
    done = [job.end() for job in jobs]
    assert [each.returncode for each in done] == [130, 130], done[0].stderr + done[1].stderr
    assert read_resume(RunFolder(tmp_path).resume)["step"] == done[0].stdout.count("Accuracy") < 16
    if len(heard) == 2:
        goes_on(root, tmp_path, undisturbed)


@pytest.mark.long
def test_a_hanging_process_ends_the_job_with_the_stack_of_who_waits(root, tmp_path):
    changes = options_for(root, tmp_path, **{"TRAIN.epoch_iters": 50, "RUNTIME.timeout": 4, "TRAIN.eval_epoch": 0})
    waits, hangs = start_ranks("train.py", words(changes))
    waits.until("Epoch: [1][3/50]")
    hangs.send(signal.SIGSTOP)
    done = waits.end(60)
    hangs.kill()
    assert done.returncode == 2
    assert re.search(BROKEN.format(rank=0, other=1), done.stderr), done.stderr
    assert re.search(
        r"(?s)no progress for 4 s in step \d+; this process is at\n.*train\.py.*work\.wait\(\)", done.stdout
    )


class Slow(TrainDataset):
    """Takes longer than the others wait, though not in one go."""

    def __getitem__(self, index):
        time.sleep(0.7)
        return super().__getitem__(index)


def _trained_slowly(rank, root, folder):
    module = tiny_module(crit=MaskedNLLLoss())
    optimizer = build_optimizer(module.encoder, module.decoder)
    dataset = (Slow if rank else TrainDataset)(root, "train", options(), 1)
    settings = Settings(num_epoch=1, epoch_iters=4, timeout=2.0)
    processes = Processes(Place(rank, 2, rank, 2), timeout=2.0)
    return fit(
        module, optimizer, dataset, RunFolder(folder), settings, devices=[torch.device("cpu")], processes=processes
    ).step


@pytest.mark.long
def test_a_slow_process_is_waited_for(root, tmp_path):
    """The time-out is of every exchange, not of all of them."""
    assert in_processes(2, tmp_path, _trained_slowly, root, tmp_path / "run") == [4, 4]


@pytest.mark.long
def test_a_process_without_memory_says_so_and_ends_the_job(root, tmp_path, undisturbed):
    jobs = start_ranks("train.py", words(options_for(root, tmp_path, **{"TRAIN.workers": 0})))
    jobs[0].until("Epoch: [1][3/8]")
    used = int(Path(f"/proc/{jobs[1].pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(jobs[1].pid, resource.RLIMIT_AS, (used, used))
    resource.prlimit(jobs[1].pid, resource.RLIMIT_DATA, (2**20, 2**20))
    first, second = (job.end() for job in jobs)
    assert (first.returncode, second.returncode) == (2, 2), second.stderr
    assert re.search(r"error: \[rank 1\] this machine is out of memory", second.stderr), second.stderr
    assert re.search(BROKEN.format(rank=0, other=1), first.stderr), first.stderr
    goes_on(root, tmp_path, undisturbed)


def test_processes_with_other_options_do_not_start(root, tmp_path):
    own = [(), ("TRAIN.lr_decoder", "0.5", "DATASET.imgMaxSize", "90")]
    for job in start_ranks("train.py", words(options_for(root, tmp_path)), own=own):
        done = job.end()
        assert done.returncode == 2
        assert (
            "the processes of the job were not started alike, they differ in DATASET.imgMaxSize (rank 0: 100, rank 1: "
            "90); TRAIN.lr_decoder (rank 0: 0.01, rank 1: 0.5)"
        ) in done.stderr
    assert not tmp_path.joinpath("log.txt").exists()


@pytest.mark.long
def test_processes_with_other_code_do_not_start(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "mit_semseg", copy / "mit_semseg", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", copy)
    with open(copy / "mit_semseg" / "engine" / "losses.py", "a") as file:
        file.write("# changed\n")
    arguments = ["--gpus", "cpu", *words(options_for(root, tmp_path / "run"))]
    for job in started(*((place, place / "train.py", *arguments) for place in (ROOT, copy))):
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 2
        assert re.search(r"they differ in the code of mit_semseg \(rank 0: \w{12}, rank 1: \w{12}\)", errors), errors


WAITING = """
import os, signal, time
import torch
from mit_semseg.cli import common as cli
from mit_semseg.engine.distributed import join

def main():
    with join(torch.device("cpu"), {timeout}) as processes:
        if processes.rank:
            {what}
        processes.collect(None, "waiting for the shares of the others", patient=True)

cli.run(main)
"""


def waiting(timeout, what):
    """Two processes, of which the second does something before the first has its share."""
    return started(*[(ROOT, "-c", WAITING.format(timeout=timeout, what=what))] * 2)


def test_a_process_stopped_in_its_share_is_noticed():
    """Nobody knows how long a share may take; but a process at work gives signs of life."""
    first, second = waiting(4, "os.kill(os.getpid(), signal.SIGSTOP)")
    _, errors = first.communicate(timeout=40)
    second.kill()
    second.communicate()
    assert first.returncode == 2
    assert re.search(BROKEN.format(rank=0, other=1), errors), errors
    assert "waiting for the shares of the others: no sign of life for 4 s of process 1" in errors


def test_a_share_may_take_longer_than_the_time_out():
    for job in waiting(2, "time.sleep(7)"):
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors


FAILING = """
import atexit, multiprocessing, os, sys, time
import torch
from mit_semseg.cli import common as cli
from mit_semseg.engine.distributed import join
from mit_semseg.lib.utils import UserError

def main():
    atexit.register(os.abort)
    with join(torch.device("cpu"), 60):
        child = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        print(child.pid, end="")
        raise {error}

cli.run(main)
"""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("UserError('no such list')", 2, "error: [rank {rank}] no such list"),
        ("KeyError('bug')", 1, "KeyError: 'bug'"),
    ],
)
def test_failing_processes_do_not_wait_for_threads_of_their_groups(error, code, told):
    """Such a thread, still at work while Python ends, aborted one process in a hundred; here `abort` stands for it."""
    for rank, job in enumerate(started(*[(ROOT, "-c", FAILING.format(error=error))] * 2)):
        child, errors = job.communicate(timeout=60)
        assert job.returncode == code, errors
        assert errors.splitlines()[-1] == told.format(rank=rank)
        assert not Path(f"/proc/{child}").exists()


class Network:
    """Two network namespaces of their own, and a cable between them."""

    names = (f"semseg-a-{os.getpid()}", f"semseg-b-{os.getpid()}")
    addresses = ("10.231.7.1", "10.231.7.2")

    def __enter__(self):
        a, b = self.names
        commands = [
            f"netns add {a}",
            f"netns add {b}",
            f"link add cable-a netns {a} type veth peer name cable-b netns {b}",
        ]
        for name, address, cable in zip(self.names, self.addresses, ("cable-a", "cable-b"), strict=True):
            commands += [f"-n {name} address add {address}/24 dev {cable}", f"-n {name} link set {cable} up"]
            commands += [f"-n {name} link set lo up"]
        for command in commands:
            if subprocess.run(["ip", *command.split()], capture_output=True).returncode:
                self.__exit__()
                pytest.skip("needs the right to make network namespaces")
        return self

    def cable(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.names[1], "link", "set", "cable-b", state], check=True)

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, rank, arguments):
        env = {**rank_environment(rank, 2, 29511), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": self.addresses[0], "GLOO_SOCKET_IFNAME": f"cable-{'ab'[rank]}"}
        command = ["ip", "netns", "exec", self.names[rank], sys.executable, str(ROOT / "train.py"), *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_a_cut_network_ends_both_sides_and_the_run_goes_on(root, tmp_path, undisturbed):
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    arguments = ["--gpus", "cpu", *words(options_for(root, tmp_path, **{"RUNTIME.timeout": 6}))]
    with Network() as network:
        jobs = [network.start(rank, arguments) for rank in (0, 1)]
        try:
            for line in jobs[0].stdout:
                if "Epoch: [1][5/8]" in line:
                    break
            network.cable("down")
            cut = time.perf_counter()
            for rank, job in enumerate(jobs):
                _, errors = job.communicate(timeout=60)
                assert job.returncode == 2, errors
                assert re.search(rf"error: \[rank {rank}\] .*does not answer, so this one", errors), errors
            assert time.perf_counter() - cut < 40
            network.cable("up")
            jobs = [network.start(rank, arguments) for rank in (0, 1)]
            for job in jobs:
                _, errors = job.communicate(timeout=100)
                assert job.returncode == 0, errors
        finally:
            for job in jobs:
                with contextlib.suppress(ProcessLookupError):
                    job.kill()
                job.wait()
    assert same(weights(tmp_path), undisturbed)
