"""Command line parser, checks of the ranks, and exit codes of the scripts."""

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
EXIT_CODES = "exit codes: 0 success, 1 images were skipped, 2 error (see the last line), 130 Ctrl-C, 143 SIGTERM"
OUT_OF_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "could not create a primitive")  # PyTorch, C++, oneDNN
MEMORY_HINT = (
    "for training reduce TRAIN.batch_size_per_gpu, DATASET.imgSizes, DATASET.imgMaxSize, DATASET.crop_size or "
    "TRAIN.workers; for inference set INFERENCE.window_size"
)

# Configuration options that --help of the scripts lists.
TRAIN_KEYS = (
    "DIR", "DATASET.root_dataset", "TRAIN.batch_size_per_gpu", "TRAIN.num_epoch", "TRAIN.lr_encoder",
    "TRAIN.lr_decoder", "TRAIN.amp", "TRAIN.resume", "TRAIN.eval_epoch",
)  # fmt: skip
EVAL_KEYS = (
    "DIR", "VAL.checkpoint", "VAL.visualize", "DATASET.imgSizes", "INFERENCE.flip", "INFERENCE.window_size",
    "INFERENCE.precision",
)  # fmt: skip
TEST_KEYS = ("DIR", "TEST.checkpoint", "TEST.result", *EVAL_KEYS[3:])
LOCAL_KEYS = ("DATASET.root_dataset", "DATASET.list_train", "DATASET.list_val")  # may differ between machines


def make_parser(description: str, examples: str, keys: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with `--cfg`, `--gpus`, `-v`, `-q` and trailing `KEY VALUE` options.

    Its help lists the configuration options `keys` and the example commands (one per line).
    """
    lines = [f"  {key}  ({OPTIONS[key].default!r}) {OPTIONS[key].help}" for key in keys]
    lines = [textwrap.fill(line, 118, subsequent_indent=" " * 6) for line in lines]
    head = ["common options, with their defaults (all: docs/options.md):", *lines, "", ""] if keys else []
    parser = argparse.ArgumentParser(
        description=description,
        epilog="\n".join([*head, f"examples:\n{examples}\n\n{EXIT_CODES}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_verbosity(parser)
    text = (
        "GPU numbers such as 0, 0-3 or 0,2; cpu, or cpu,cpu to run two copies of the network; cuda:1; or mps. Default, "
        "or auto: the first GPU, or the CPU if there is none; with torchrun, one GPU per process"
    )
    parser.add_argument("--gpus", "--gpu", "--device", dest="device", metavar="DEVICES", help=text)
    add_config_arguments(parser, DEFAULT_CONFIG)
    return parser


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add `-v` and `-q`, which set `args.level` for `setup_logger`."""
    group = parser.add_mutually_exclusive_group()
    store = {"dest": "level", "action": "store_const", "default": logging.INFO}
    group.add_argument("-v", "--verbose", **store, const=logging.DEBUG, help="also print versions and error tracebacks")
    group.add_argument("-q", "--quiet", **store, const=logging.WARNING, help="print only results and warnings")


def check_ranks(cfg: Config, world: World) -> None:
    """Raise a `UserError` if ranks were started with different options or PyTorch versions."""
    options = {key: cfg.option(key) for key in OPTIONS if key not in LOCAL_KEYS}
    world.check_equal({"the PyTorch version": torch.__version__, **options})


def resume_after_restart(cfg: Config, folder: RunFolder, world: World) -> None:
    """Set TRAIN.resume auto in `cfg` if torchrun has restarted the job (--max-restarts) after a checkpoint was saved.

    A checkpoint of another job in the folder does not change TRAIN.resume.
    """
    saved = world.is_main and world.restarts and folder.resume.is_file()
    own = bool(saved and read_resume(folder.resume).get("job") == world.job)
    if world.gather(own, "looking for a checkpoint")[0]:
        cfg.defrost()
        cfg.TRAIN.resume, cfg.TRAIN.start_epoch = "auto", 0
        cfg.freeze()


def refuse_torchrun(message: str) -> None:
    """Raise a `UserError` with the message if torchrun has started several processes."""
    if World.from_environment().size > 1:
        raise UserError(message)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that Python, PyTorch or one of its libraries has run out of memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(text in str(error) for text in OUT_OF_MEMORY)


def run(main: Callable[[], int | None], hint: str = "") -> NoReturn:
    """Call the main function of a script and exit with the code that it returns (None: 0), see `EXIT_CODES`.

    A `UserError` is printed without a traceback, unless -v is given. `hint` is printed after Ctrl-C or SIGTERM; it says
    what was saved and how to continue.
    """
    prepare_streams()
    os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported if the backend is not installed
    try:
        code = _exit_code(main, hint)
    except Exception:
        traceback.print_exc()
        code = 1
    if dist.is_available() and dist.is_initialized():
        # An error has ended this rank. Threads of its process groups may still wait for other ranks. They would abort
        # the interpreter at a normal exit, and the exit code would be that of SIGABRT.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM within the context, but not with torchrun, which stops all ranks by SIGTERM."""
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
    """Call `main`, print expected errors, and return the exit code."""
    try:
        with _sigterm_raises():
            return main()
    except UserError as error:
        # An error that a DataLoader worker has raised contains the traceback of the worker before the message.
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
    if {"-v", "--verbose"} & set(sys.argv):  # the error may have occurred before the logger was set up
        traceback.print_exc()
    world = World.from_environment()
    text = f"error: {f'[rank {world.rank}] ' if world.size > 1 else ''}{text}"
    print(colored(text, logging.ERROR) if takes_colors(sys.stderr) else text, file=sys.stderr, flush=True)
    return 2
