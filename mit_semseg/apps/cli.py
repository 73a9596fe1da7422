"""What the scripts share: parsers, logging, and how they end."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from ..config import Config, add_config_arguments
from ..engine import Processes, RunFiles
from ..engine.checkpoint import read_resume
from ..engine.distributed import Place
from ..lib.utils import UserError

DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"
LOG_FORMAT = "[%(asctime)s %(levelname)s] %(message)s"


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Parser with `--cfg`, the device option and the trailing options; examples are shown below the help."""
    parser = argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def setup_logger(distributed_rank: int = 0, filename: str | None = "log.txt") -> logging.Logger:
    """Log to the terminal and, if a name is given, to a file (appended to).

    Args:
        distributed_rank: of this process; all but 0 log warnings only, with their rank, to the same file.
        filename: of the log; None logs to the terminal alone.

    Returns:
        The toolkit's logger.
    """
    log = logging.getLogger(__package__.split(".")[0])
    log.setLevel(logging.INFO if distributed_rank == 0 else logging.WARNING)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    form = LOG_FORMAT.replace("]", f" rank {distributed_rank}]") if distributed_rank else LOG_FORMAT
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if filename:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(filename, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    return log


def after_restart(cfg: Config, files: RunFiles, processes: Processes) -> Config:
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


def refuse_torchrun(message: str) -> None:
    """Raise a `UserError` with the message if torchrun has started this process."""
    if Place.of_this_process().size > 1:
        raise UserError(message)


def run(main: Callable[[], int | None], kept: str = "") -> None:
    """Run a script's main function and exit with its code: 0, or 1 where something was left out.

    A user's mistake is printed without a traceback and exits with 2, Ctrl-C with 130.

    Args:
        kept: what is there after Ctrl-C, and how to go on.
    """
    try:
        sys.exit(main())
    except UserError as error:
        # A loader process puts its traceback before the message.
        _fail(str(error).split(f"{type(error).__name__}: ")[-1].strip())
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except torch.OutOfMemoryError as error:
        _fail(
            f"the GPU is out of memory ({str(error).splitlines()[0]}); in training lower "
            f"TRAIN.batch_size_per_gpu, DATASET.imgSizes, DATASET.imgMaxSize or DATASET.crop_size, elsewhere set "
            f"INFERENCE.window"
        )
    except KeyboardInterrupt:
        print(f"interrupted{f': {kept}' if kept else ''}", file=sys.stderr)
        sys.exit(130)


def _fail(text: str) -> NoReturn:
    place = Place.of_this_process()
    print(f"error: {f'[rank {place.rank}] ' if place.size > 1 else ''}{text}", file=sys.stderr, flush=True)
    sys.exit(2)
