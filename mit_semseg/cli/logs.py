"""The log: on the terminal, and in a file."""

import logging
import os
import platform
import sys
from pathlib import Path

import torch

from ..config import Config
from ..lib.utils import TEXT, is_terminal, quiet_bars

LOG_FORMAT = "[%(asctime)s %(levelname)s] %(message)s"
COLORS = {logging.WARNING: "33", logging.ERROR: "31"}  # yellow and red, of terminals


class _LogFile(logging.FileHandler):
    """A log on a disk that may become full: said once, and the run goes on."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            print(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


class _Colored(logging.Formatter):
    """Warnings and errors in colour."""

    def format(self, record: logging.LogRecord) -> str:
        return colored(super().format(record), record.levelno)


def colored(text: str, level: int) -> str:
    """Text in the colour that messages of a level have on a terminal."""
    return f"\033[{COLORS[level]}m{text}\033[0m" if level in COLORS else text


def takes_colors(stream) -> bool:
    """Whether a stream is a terminal that may be written to in colours."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")  # https://no-color.org


def setup_logger(
    distributed_rank: int = 0, filename: str | None = "log.txt", level: int = logging.INFO
) -> logging.Logger:
    """Log to the terminal and, if a name is given, to a file (appended to).

    Args:
        distributed_rank: of this process; all but 0 log warnings only, with their rank, to the same file.
        filename: of the log; None logs to the terminal alone.
        level: of what is logged; the file gets messages of level INFO in any case.

    Returns:
        The toolkit's logger.
    """
    log = logging.getLogger(__package__.split(".")[0])
    log.propagate = False
    quiet_bars(level > logging.INFO)
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    form = LOG_FORMAT.replace("]", f" rank {distributed_rank}]") if distributed_rank else LOG_FORMAT
    handlers: list[tuple[logging.Handler, int]] = [(logging.StreamHandler(sys.stdout), level)]
    if filename:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        handlers.append((_LogFile(filename, **TEXT), min(level, logging.INFO)))
    handlers[0][0].addFilter(lambda record: not hasattr(record, "file_only"))
    for handler, least in handlers:
        handler.setLevel(max(least, logging.WARNING) if distributed_rank else least)
        kind = _Colored if handler is handlers[0][0] and takes_colors(sys.stdout) else logging.Formatter
        handler.setFormatter(kind(form, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(min(handler.level for handler in log.handlers))
    log.debug("Python %s, PyTorch %s on %s", platform.python_version(), torch.__version__, platform.platform())
    return log


def log_options(log: logging.Logger, cfg: Config) -> None:
    """Log the options that differ from the defaults; the log file receives all options."""
    log.info("all options:\n%s", cfg.dump(), extra={"file_only": True})
    changed = "".join(f"\n  {key} {value}" for key, value in cfg.differences().items())
    log.info("options that differ from the defaults:%s", changed or " none")
