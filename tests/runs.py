"""Run the scripts in a new process or in the test process.

Importing torch takes six seconds, so new processes are forked from a server that has imported torch. They run the
script as `__main__` with their own arguments, environment and output.
"""

import importlib
import importlib.util
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from unittest import mock

import offline
import pytest
import torch

from mit_semseg.cli import common

offline.forbid()  # the fork server imports this module, so this also applies there

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "DATASET.list_train": "train",
    "DATASET.list_val": "val",
    "DATASET.num_class": 3,
    "DATASET.imgSizes": "(40,48)",
    "DATASET.imgMaxSize": 100,
    "MODEL.arch_encoder": "mobilenetv2dilated",
    "MODEL.arch_decoder": "c1_deepsup",
    "MODEL.pretrained": False,
    "TRAIN.num_epoch": 2,
    "TRAIN.epoch_iters": 3,
    "TRAIN.disp_iter": 2,
    "TRAIN.workers": 0,
    "TRAIN.lr_encoder": 0.01,
    "TRAIN.lr_decoder": 0.01,
    "VAL.checkpoint": "epoch_2.pth",
    "TEST.checkpoint": "epoch_2.pth",
}


forked = get_context("forkserver")
forked.set_forkserver_preload(["torch._dynamo", "mit_semseg.cli.evaluate", "mit_semseg.predict.video", "runs"])


def _run_as_main(
    name: str, arguments: list[str], cwd: str, env: dict[str, str], start_method: str, output: str, errors: str
) -> None:
    set_start_method(start_method, force=True)  # applies to processes that the script starts
    os.setsid()
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 2)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(ROOT))
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


class Job:
    """A script that runs in a new process and session.

    Args:
        name: a script (*.py) in the root folder of the repository, or a module.
        arguments: command line arguments, converted by `words`.
        cwd: working directory.
        env: environment variables to add or replace.
        start_method: start method of multiprocessing in the script; by default that of the test process.
    """

    def __init__(
        self, name: str, *arguments, cwd=ROOT, env: dict[str, str] | None = None, start_method: str | None = None
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, part) for part in ("stdout", "stderr")]
        for path in self._files:
            path.touch()
        self._read = self._files[0].open(encoding="utf-8")
        # As many threads as in the test process, because rounding errors depend on their number.
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(env or {})}
        args = name, words(*arguments), str(cwd), env, start_method or get_start_method()
        self._process = forked.Process(target=_run_as_main, args=(*args, *map(str, self._files)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; -N if signal N ended the process, None while the process runs."""
        return self._process.exitcode

    def lines(self, timeout: float = 120):
        """Yield new lines of standard output until the process ends; kill the process after `timeout` seconds."""
        line, deadline = "", time.perf_counter() + timeout
        while True:
            if time.perf_counter() > deadline:
                self.kill()
                raise AssertionError(f"the process was still running after {timeout} s; stderr: {self.errors()}")
            ended = not self._process.is_alive()
            while part := self._read.readline():
                line += part
                if line.endswith("\n"):
                    yield line
                    line = ""
            if ended:
                return
            time.sleep(0.005)

    def until(self, text: str) -> None:
        """Wait until the process prints a line that contains the text."""
        if not any(text in line for line in self.lines()):
            raise AssertionError(f"the process ended before it printed {text!r}; stderr: {self.errors()}")

    def errors(self) -> str:
        """Return the text that the process has written to standard error so far."""
        return self._files[1].read_text(encoding="utf-8")

    def send(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def end(self, timeout: float = 120, code: int | None = 0) -> subprocess.CompletedProcess:
        """Wait until the process ends, or kill it after `timeout` seconds; check the exit code, return the output."""
        self._process.join(timeout)
        self.kill()
        self._process.join()
        output, errors = (path.read_text(encoding="utf-8") for path in self._files)
        return checked(subprocess.CompletedProcess([], self.returncode, output, errors), code)

    def kill(self) -> None:
        """Kill the process and the processes in its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def words(*arguments) -> list[str]:
    """Return command line arguments as strings; a dict is expanded to its keys and values."""
    groups = (sum(each.items(), ()) if isinstance(each, dict) else (each,) for each in arguments)
    return [str(word) for group in groups for word in group]


def small(root, folder, **changes) -> dict:
    """Return the arguments of a short run on the CPU; `TRAIN__seed=1` changes the option TRAIN.seed."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {"--gpu": "cpu", **SMALL, "DATASET.root_dataset": root, "DIR": folder, **changes}


def script(name: str, *arguments, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a script or module in a new process (see `Job`), check its exit code, and return its output."""
    return Job(name, *arguments, **options).end(300, code)


def load_script(name: str):
    """Import a script (*.py) in the root folder of the repository, or a module; return the module object."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"script_{name.removesuffix('.py')}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_process(name: str, *arguments) -> int:
    """Run `main` of a script or module in the test process; return its exit code. Exceptions are not caught.

    To save time, no curves are plotted, and worker processes are forked instead of spawned.
    """
    with (
        mock.patch.object(sys, "argv", [name, *words(*arguments)]),
        mock.patch("multiprocessing.get_context", return_value=forked),
        mock.patch("mit_semseg.cli.run_logger.save_curves"),
    ):
        return load_script(name).main() or 0


def here(name: str, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script or module in the test process, check its exit code, and return its output."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        common.run(lambda: in_process(name, *arguments))
    return checked(subprocess.CompletedProcess([], end.value.code or 0, out.getvalue(), err.getvalue()), code)


def checked(done: subprocess.CompletedProcess, code: int | None) -> subprocess.CompletedProcess:
    """Check the exit code (None: any), and that no traceback is printed with the codes 2, 130 and 143."""
    assert code in (done.returncode, None), f"got exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr}"
    assert code not in (2, 130, 143) or "Traceback" not in done.stderr
    return done


def results(path) -> tuple[dict, dict]:
    """Return the content of results.json without times: exact values, and values that depend on rounding errors."""
    content = {key: value for key, value in json.loads(Path(path).read_text()).items() if "second" not in key}
    rounded = {row["image"]: row["label_quality"] for row in content.pop("per_image")}
    return content, rounded | {"error": content.pop("expected_calibration_error")}


def assert_same_results(first: tuple[dict, dict], second: tuple[dict, dict]) -> None:
    """Compare the results of two evaluations, see `results`."""
    assert first[0] == second[0]
    assert first[1] == pytest.approx(second[1], rel=1e-4)


def weights(folder, suffix="epoch_2.pth") -> dict[str, torch.Tensor]:
    """Return the weights of a run; the keys start with `encoder.` or `decoder.`."""
    return {
        f"{part}.{key}": value
        for part in ("encoder", "decoder")
        for key, value in torch.load(Path(folder, f"{part}_{suffix}"), weights_only=True).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
