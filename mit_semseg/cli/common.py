"""What the scripts share: parsers, what is compared at the start, and how they end."""

import argparse
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from ..config import OPTIONS, Config, add_config_arguments
from ..engine import Processes, RunFolder
from ..engine.checkpoint import read_resume
from ..engine.distributed import Place
from ..lib.utils import UserError, prepare_streams
from .logs import colored, takes_colors

DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"
EXIT_CODES = (
    "exit codes: 0 done, 1 something was left out, 2 a mistake that the last line explains, 130 Ctrl-C, 143 SIGTERM"
)

NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "could not create a primitive")  # the last is oneDNN's way to say it
SMALLER = (
    "in training lower TRAIN.batch_size_per_gpu, DATASET.imgSizes, DATASET.imgMaxSize, DATASET.crop_size or "
    "TRAIN.workers, elsewhere set INFERENCE.window_size"
)

# The options that are changed most often, for the help of the scripts.
TRAINING = (
    "DIR", "DATASET.root_dataset", "TRAIN.batch_size_per_gpu", "TRAIN.num_epoch", "TRAIN.lr_encoder",
    "TRAIN.lr_decoder", "TRAIN.amp", "TRAIN.resume", "TRAIN.eval_epoch",
)  # fmt: skip
EVALUATION = (
    "DIR", "VAL.checkpoint", "VAL.visualize", "DATASET.imgSizes", "INFERENCE.flip", "INFERENCE.window_size",
    "INFERENCE.precision",
)  # fmt: skip
PICTURES = ("DIR", "TEST.checkpoint", "TEST.result", *EVALUATION[3:])


def make_parser(description: str, examples: str, keys: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Parser with `--cfg`, the device option, `-v`, `-q` and the trailing options.

    Args:
        description: on top of the help.
        examples: below the help, a line each.
        keys: options of the YAML that the help explains.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{_explained(keys)}examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_verbosity(parser)
    parser.add_argument(
        "--gpus",
        "--gpu",
        "--device",
        dest="device",
        metavar="DEVICES",
        help="GPUs such as 0, 0-3 or 0,2, or cpu, or cpu,cpu, or cuda:1, or mps (default, also as auto: the first GPU "
        "if there is one, else the CPU; under torchrun one GPU per process)",
    )
    add_config_arguments(parser, DEFAULT_CONFIG)
    return parser


def _explained(keys: Sequence[str]) -> str:
    """Options with their meaning and default."""
    if not keys:
        return ""
    lines = [f"  {key}  ({OPTIONS[key].default!r}) {OPTIONS[key].help}" for key in keys]
    lines = [textwrap.fill(line, 118, subsequent_indent=" " * 6) for line in lines]
    return "\n".join(["keys that are changed most often, with their defaults (all: docs/options.md):", *lines, "", ""])


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Give a parser `-v` and `-q`, whose `args.level` is for `setup_logger`."""
    given = parser.add_mutually_exclusive_group()
    for flags, level, text in (
        (("-v", "--verbose"), logging.DEBUG, "say more: versions, and where in the code a mistake was found"),
        (("-q", "--quiet"), logging.WARNING, "say less: results and warnings only, no progress"),
    ):
        given.add_argument(*flags, dest="level", action="store_const", const=level, default=logging.INFO, help=text)


def after_restart(cfg: Config, files: RunFolder, processes: Processes) -> Config:
    """Options of a run that torchrun has started again (--max-restarts): it goes on from what it has saved.

    Only what this very job has saved: an older run in the folder is treated as TRAIN.resume says.
    """
    saved = processes.main and processes.place.restarts and files.resume.is_file()
    own = bool(saved and read_resume(files.resume).get("job") == processes.place.job)
    if not processes.collect(own, "looking for a checkpoint")[0]:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAIN.resume, cfg.TRAIN.start_epoch = "auto", 0
    cfg.freeze()
    return cfg


# What may be another on every machine.
OF_THE_MACHINE = ("DATASET.root_dataset", "DATASET.list_train", "DATASET.list_val")


def compare(cfg: Config, processes: Processes) -> None:
    """Check that all processes of a job have the same options and the same code.

    Raises:
        UserError: they differ; names in what.
    """
    if processes.size == 1:
        return
    values = {key: cfg.option(key) for key in OPTIONS if key not in OF_THE_MACHINE}
    processes.agree({"the version of PyTorch": torch.__version__, "the code of mit_semseg": _code(), **values})


def _code() -> str:
    """A number of the package's code."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how Python, PyTorch or one of its libraries says that there is no memory left."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in NO_MEMORY)


def refuse_torchrun(message: str) -> None:
    """Raise a `UserError` with the message if torchrun has started this process."""
    if Place.of_this_process().size > 1:
        raise UserError(message)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a script as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """In here SIGTERM raises `Terminated`; not under torchrun, which waits for processes that wait for one another."""
    if Place.of_this_process().size > 1:
        yield
        return

    def raise_terminated(*_) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(main: Callable[[], int | None], kept: str = "") -> None:
    """Run a script's main function and exit with its code: 0, or 1 where something was left out.

    A user's mistake is printed without a traceback (with one after -v) and exits with 2, Ctrl-C with 130, SIGTERM with
    143.

    Args:
        kept: what is there after Ctrl-C, and how to go on.
    """
    prepare_streams()
    with _left_at_once():
        code = _outcome(main, kept)
    sys.exit(code)


def _outcome(main: Callable[[], int | None], kept: str) -> int | None:
    """What a script's main function returns; exits where it fails, see `run`."""
    try:
        with _terminable():
            return main()
    except UserError as error:
        # A loader process puts its traceback before the message.
        _fail(str(error).split(f"{type(error).__name__}: ")[-1].strip())
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except torch.OutOfMemoryError as error:
        _fail(f"the GPU is out of memory ({str(error).splitlines()[0]}); {SMALLER}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
        _fail(f"this machine is out of memory ({reason or 'MemoryError'}); {SMALLER}")
    except KeyboardInterrupt as interruption:
        what, code = ("ended by SIGTERM", 143) if isinstance(interruption, Terminated) else ("interrupted", 130)
        print(f"{what}{f': {kept}' if kept else ''}", file=sys.stderr)
        sys.exit(code)


@contextmanager
def _left_at_once() -> Iterator[None]:
    """In here a process that has joined a job and fails ends with its exit code, whatever still runs in it.

    The threads of its process groups cannot be waited for where the others do not answer any more, and such a thread
    that lets go of a tensor while Python ends takes the process down (SIGABRT in place of the exit code).
    """
    try:
        yield
    except BaseException as error:
        if not (dist.is_available() and dist.is_initialized()):
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        for process in multiprocessing.active_children():  # of the loaders
            process.kill()
            process.join()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a pipe that nobody reads any more
                stream.flush()
        os._exit(code or 0)


def _fail(text: str) -> NoReturn:
    """Print what is wrong, while an error is handled, and exit."""
    if {"-v", "--verbose"} & set(sys.argv):  # also before the log is set up
        traceback.print_exc()
    place = Place.of_this_process()
    text = f"error: {f'[rank {place.rank}] ' if place.size > 1 else ''}{text}"
    print(colored(text, logging.ERROR) if takes_colors(sys.stderr) else text, file=sys.stderr, flush=True)
    sys.exit(2)
