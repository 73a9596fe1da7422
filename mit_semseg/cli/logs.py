"""Logging to the terminal and to a file."""

import logging
import os
import platform
import sys
from pathlib import Path

import torch

from ..config import Config
from ..lib.utils import UTF8, disable_progress_bars, is_terminal

LOG_FORMAT = "[%(asctime)s %(levelname)s] %(message)s"
COLORS = {logging.WARNING: "33", logging.ERROR: "31"}  # ANSI yellow and red


class _LogFile(logging.FileHandler):
    """A log file. Prints one warning if writing fails (full disk), instead of a traceback for every line."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            print(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


class _ColorFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return colored(super().format(record), record.levelno)


def colored(text: str, level: int) -> str:
    """Return a text with the terminal color of a log level, if the level has a color."""
    return f"\033[{COLORS[level]}m{text}\033[0m" if level in COLORS else text


def takes_colors(stream) -> bool:
    """Return whether a stream is a terminal and NO_COLOR (https://no-color.org) is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def setup_logger(
    distributed_rank: int = 0, filename: str | None = "log.txt", level: int = logging.INFO
) -> logging.Logger:
    """Configure the logger of the package to print to the terminal and append to a log file.

    Args:
        distributed_rank: rank of this process. Ranks above 0 log only warnings and errors, with their rank.
        filename: path of the log file; None for no log file.
        level: log level of the terminal. The log level of the file is `level` or INFO, whichever is lower.

    Returns:
        The logger of the package.
    """
    log = logging.getLogger(__package__.split(".")[0])
    log.propagate = False
    disable_progress_bars(level > logging.INFO)
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    form = LOG_FORMAT.replace("]", f" rank {distributed_rank}]") if distributed_rank else LOG_FORMAT
    terminal = logging.StreamHandler(sys.stdout)
    terminal.addFilter(lambda record: not hasattr(record, "file_only"))
    handlers: list[tuple[logging.Handler, int]] = [(terminal, level)]
    if filename:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        handlers.append((_LogFile(filename, **UTF8), min(level, logging.INFO)))
    for handler, least in handlers:
        handler.setLevel(max(least, logging.WARNING) if distributed_rank else least)
        kind = _ColorFormatter if handler is terminal and takes_colors(sys.stdout) else logging.Formatter
        handler.setFormatter(kind(form, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(min(handler.level for handler in log.handlers))
    log.debug("Python %s, PyTorch %s on %s", platform.python_version(), torch.__version__, platform.platform())
    return log


def log_options(log: logging.Logger, cfg: Config) -> None:
    """Log the options that differ from the defaults, and write all options to the log file."""
    log.info("all options:\n%s", cfg.dump(), extra={"file_only": True})
    changed = "".join(f"\n  {key} {value}" for key, value in cfg.differences().items())
    log.info("options that differ from the defaults:%s", changed or " none")
