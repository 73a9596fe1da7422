"""Command line parser, rank checks, error handling and exit codes, shared by the scripts."""

import argparse
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
import torch.distributed as dist

from ..config import OPTIONS, Config, add_config_arguments
from ..engine import RunFolder, World
from ..engine.checkpoint import read_resume
from ..lib.utils import UserError, prepare_streams
from .logs import colored, takes_colors

DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"
EXIT_CODES = "exit codes: 0 success, 1 skipped images or a crash, 2 error (see last line), 130 Ctrl-C, 143 SIGTERM"
# Errors of PyTorch, C++, oneDNN and Python's faulthandler
OUT_OF_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "could not create a primitive", "unable to start watchdog thread")
MEMORY_HINT = (
    "for training reduce TRAIN.batch_size_per_gpu, DATASET.imgSizes, DATASET.imgMaxSize, DATASET.crop_size or "
    "TRAIN.workers; for inference set INFERENCE.window_size"
)

# Configuration options listed by --help of each script.
TRAIN_KEYS = (
    "DIR", "DATASET.root_dataset", "TRAIN.batch_size_per_gpu", "TRAIN.num_epoch", "TRAIN.lr_encoder",
    "TRAIN.lr_decoder", "TRAIN.amp", "TRAIN.resume", "TRAIN.eval_epoch",
)  # fmt: skip
EVAL_KEYS = (
    "DIR", "VAL.checkpoint", "VAL.visualize", "DATASET.imgSizes", "INFERENCE.flip", "INFERENCE.window_size",
    "INFERENCE.precision",
)  # fmt: skip
TEST_KEYS = ("DIR", "TEST.checkpoint", "TEST.result", *EVAL_KEYS[3:])
LOCAL_KEYS = ("DATASET.root_dataset", "DATASET.list_train", "DATASET.list_val")  # values may differ between ranks


def make_parser(description: str, examples: str, keys: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with `--cfg`, `--gpus`, `-v`, `-q` and trailing `KEY VALUE` options.

    The help text lists the configuration options `keys` and the commands in `examples` (one per line).
    """
    lines = [f"  {key}  ({OPTIONS[key].default!r}) {OPTIONS[key].help}" for key in keys]
    lines = [textwrap.fill(line, 118, subsequent_indent=" " * 6) for line in lines]
    head = ["common options with defaults (docs/options.md lists all options):", *lines, "", ""] if keys else []
    parser = argparse.ArgumentParser(
        description=description,
        epilog="\n".join([*head, f"examples:\n{examples}\n\n{EXIT_CODES}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_verbosity(parser)
    text = (
        "GPU numbers such as 0, 0-3 or 0,2; a device such as cpu, cuda:1 or mps; or cpu,cpu for two copies of the "
        "network. The default, auto, is the first GPU, or the CPU if there is none; with torchrun, one GPU per rank"
    )
    parser.add_argument("--gpus", "--gpu", "--device", dest="device", metavar="DEVICES", help=text)
    add_config_arguments(parser, DEFAULT_CONFIG)
    return parser


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add `-v` and `-q`, which set `args.level` to a log level for `setup_logger`."""
    group = parser.add_mutually_exclusive_group()
    store = {"dest": "level", "action": "store_const", "default": logging.INFO}
    group.add_argument("-v", "--verbose", **store, const=logging.DEBUG, help="also print versions and error tracebacks")
    group.add_argument("-q", "--quiet", **store, const=logging.WARNING, help="print only results, warnings and errors")


def check_ranks(cfg: Config, world: World) -> None:
    """Raise a `UserError` if ranks have different options (except `LOCAL_KEYS`) or PyTorch versions."""
    options = {key: cfg.option(key) for key in OPTIONS if key not in LOCAL_KEYS}
    world.check_equal({"the PyTorch version": torch.__version__, **options})


def resume_after_restart(cfg: Config, folder: RunFolder, world: World) -> None:
    """Set TRAIN.resume to auto if torchrun has restarted this job (--max-restarts) and the job saved a checkpoint.

    TRAIN.start_epoch becomes 0. If the checkpoint in `folder` was saved by another job, `cfg` does not change.
    """
    saved = world.is_main and world.restarts and folder.resume.is_file()
    own = bool(saved and read_resume(folder.resume).get("job") == world.job)
    if world.gather(own, "looking for a checkpoint")[0]:
        cfg.defrost()
        cfg.TRAIN.resume, cfg.TRAIN.start_epoch = "auto", 0
        cfg.freeze()


def refuse_torchrun(message: str) -> None:
    """Raise a `UserError` with `message` if torchrun has started several processes."""
    if World.from_environment().size > 1:
        raise UserError(message)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error reports that Python, PyTorch or a native library is out of memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(text in str(error) for text in OUT_OF_MEMORY)


def run(main: Callable[[], int | None], hint: str = "") -> NoReturn:
    """Call `main` and exit with its return value as exit code (0 for None); see `EXIT_CODES`.

    A `UserError` is printed without a traceback, unless -v is given. After Ctrl-C or SIGTERM, `hint` is printed, which
    tells the user what was saved and how to continue.
    """
    prepare_streams()
    os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported if this backend is not installed
    try:
        code = _exit_code(main, hint)
    except Exception:
        traceback.print_exc()
        code = 1
    if dist.is_available() and dist.is_initialized():
        # This rank has failed, but threads of its process groups may still wait for other ranks. At a normal exit,
        # these threads would abort the process, and its exit code would be that of SIGABRT.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the stream is a closed pipe
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """Raised when the process receives SIGTERM."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Context that raises `Terminated` on SIGTERM. In a torchrun job, SIGTERM still ends the process at once."""
    if World.from_environment().size > 1:
        yield
        return

    def raise_terminated(*_) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(main: Callable[[], int | None], hint: str) -> int | None:
    """Call `main`, print a message for an expected error, and return the exit code."""
    try:
        with _sigterm_raises():
            return main()
    except UserError as error:
        # The text of an error from a DataLoader worker is the worker's traceback followed by the message.
        return _print_error(str(error).split(f"{type(error).__name__}: ")[-1].strip())
    except OSError as error:
        if error.filename is None:
            raise
        return _print_error(f"{error.filename}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        device = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        reason = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2] or "MemoryError"
        return _print_error(f"{device} is out of memory ({reason}); {MEMORY_HINT}")
    except KeyboardInterrupt as error:
        text, code = ("terminated by SIGTERM", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        print(f"{text}{f': {hint}' if hint else ''}", file=sys.stderr)
        return code


def _print_error(text: str) -> int:
    """Print an error message and return exit code 2."""
    if {"-v", "--verbose"} & set(sys.argv):  # the error can occur before the log level is set
        traceback.print_exc()
    world = World.from_environment()
    text = f"error: {f'[rank {world.rank}] ' if world.size > 1 else ''}{text}"
    print(colored(text, logging.ERROR) if takes_colors(sys.stderr) else text, file=sys.stderr, flush=True)
    return 2
