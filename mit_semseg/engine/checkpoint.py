"""Files of a training run: weights and history of every epoch, the best weights, and the state to continue from."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from ..lib.utils import HOST, TEXT, UserError, atomic_write, is_abandoned, is_running
from ..models.weight_files import WeightsError, read_checkpoint
from ..models.weights import is_whole_network, load_weights
from .distributed import Processes

logger = logging.getLogger(__name__)

UNLOCK_SECONDS = 20.0  # loader processes of a killed run end after some seconds and hold its lock until then


# Entries of a state to continue from.
STATE = ("step", "best", "history", "meters", "encoder", "decoder", "optimizer", "optimizer_name", "scaler")


class CheckpointError(UserError, RuntimeError):
    """A run that cannot be started or continued; the message says what to do."""


def new_history() -> dict:
    """Empty history: `train` with fractional epochs, `val` with whole ones."""
    return {"train": {"epoch": [], "loss": [], "acc": []}, "val": {"epoch": [], "mean_iou": [], "acc": []}}


def save_atomic(obj, path: Path) -> None:
    """`torch.save` that leaves the old file or the new one under the name, never a part of one."""
    with atomic_write(path) as partial:
        _save(obj, partial)


def _save(obj, path: Path) -> None:
    with open(path, "wb") as out:
        torch.save(obj, out)
        out.flush()
        os.fsync(out.fileno())


def _may_run(holder: Path) -> bool:
    """Whether the process that last locked a folder may still be running."""
    process, _, host = holder.read_text(**TEXT).partition(" ") if holder.is_file() else ("", "", "")
    return not process.isdecimal() or host != HOST or is_running(int(process))


def _plain(history: dict) -> dict:
    """Convert NumPy scalars in a history to Python numbers."""
    return {
        part: {name: [x.item() if isinstance(x, np.generic) else x for x in points] for name, points in curves.items()}
        for part, curves in history.items()
    }


class RunFolder:
    """The folder of a run.

    `encoder_<suffix>`, `decoder_<suffix>` with suffix `epoch_N.pth` or `best.pth` are state dicts,
    `history_epoch_N.pth` the curves, `resume.pth` everything needed to continue.

    Args:
        folder: DIR of the configuration.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def part(self, name: str, suffix: str) -> Path:
        """Path of `encoder`, `decoder` or `history` with a suffix such as `epoch_20.pth`."""
        return self.folder / f"{name}_{suffix}"

    @property
    def resume(self) -> Path:
        """Path of the state to continue from."""
        return self.folder / "resume.pth"

    def remove_partial(self) -> None:
        """Remove unfinished files of processes that have ended."""
        for path in filter(is_abandoned, self.folder.rglob("*.partial")):
            logger.info("removing %s, left by an interrupted save", path)
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, processes: Processes) -> Iterator[None]:
        """Hold the lock of this folder, which only one training run can have; every process of a job calls this.

        Raises:
            CheckpointError: another run holds the lock; the message contains its process and machine.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock, holder, other = FileLock(self.folder / ".lock"), self.folder / ".lock_holder", ""
        if processes.main:
            try:
                lock.acquire(timeout=0 if _may_run(holder) else UNLOCK_SECONDS)
                holder.write_text(f"{os.getpid()} {HOST}", **TEXT)
            except Timeout:
                other = " on ".join(holder.read_text(**TEXT).split(" ", 1)) if holder.is_file() else "unknown"
        if other := processes.collect(other, "locking DIR")[0]:
            raise CheckpointError(
                f"another training run (process {other}) uses {self.folder}: wait for its end, stop it, or set another "
                f"DIR; the processes of one run are started by torchrun"
            )
        try:
            yield
        finally:
            if processes.main:
                holder.unlink(missing_ok=True)
                lock.release()

    def epochs(self) -> list[int]:
        """Epochs whose weights are in the folder, ascending."""
        names = (re.fullmatch(r"decoder_epoch_(\d+)\.pth", p.name) for p in self.folder.glob("decoder_epoch_*.pth"))
        return sorted(int(match[1]) for match in names if match)

    def is_whole(self, suffix: str) -> bool:
        """Whether encoder and decoder of a suffix are there and can be read."""
        try:
            for path in set(self.pair(suffix)):
                read_checkpoint(path)
        except UserError:
            return False
        return True

    def last_whole(self) -> int | None:
        """The newest epoch whose weights can be read."""
        return next((epoch for epoch in reversed(self.epochs()) if self.is_whole(f"epoch_{epoch}.pth")), None)

    @contextmanager
    def offering(self, suffix: str) -> Iterator[None]:
        """In here a checkpoint that is damaged is refused with the name of the newest one that can be read."""
        try:
            yield
        except UserError as error:
            if self.is_whole(suffix) or not (epoch := self.last_whole()):
                raise
            raise CheckpointError(f"{error}; epoch_{epoch}.pth in {self.folder} can be read") from None

    def last_saved(self) -> str:
        """What there is to go on from, for the sentence that ends a run."""
        epochs = self.epochs()
        weights = f"the last good checkpoint is epoch_{epochs[-1]}.pth in {self.folder}" if epochs else ""
        state = f"the last state to continue from {self.resume}" if self.resume.is_file() else ""
        return ", ".join(filter(None, (weights or "nothing was saved yet", state)))

    def check_numbers(self, step: int, epoch_iters: int) -> None:
        """Refuse to go on from a step where epochs that are there would be written over, as they had fewer steps.

        Raises:
            CheckpointError: epochs of higher numbers are there.
        """
        epochs, epoch = self.epochs(), step // epoch_iters
        if epochs and epochs[-1] > epoch:
            raise CheckpointError(
                f"{self.folder} holds epochs up to {epochs[-1]}, but step {step} with TRAIN.epoch_iters {epoch_iters} "
                f"is in epoch {epoch + 1}, which would write over them: use the TRAIN.epoch_iters of the saved run, or "
                f"move those files away"
            )

    def pair(self, suffix: str) -> tuple[Path, Path]:
        """Encoder and decoder files of a suffix.

        Where the folder has none, `suffix` may be the path of a file that holds both: that file, twice.

        Raises:
            CheckpointError: one of them is not there; lists what is.
        """
        paths = self.part("encoder", suffix), self.part("decoder", suffix)
        whole = Path(suffix)
        if not any(path.is_file() for path in paths) and whole.is_file():
            if not is_whole_network(whole):
                raise CheckpointError(
                    f"{whole} does not hold a whole network, as those of the Cityscapes toolbox do: name a checkpoint "
                    f"of {self.folder}, e.g. epoch_20.pth"
                )
            return whole, whole
        if len(whole.parts) > 1:
            raise CheckpointError(f"there is no checkpoint file {whole.absolute()}")
        for path in paths:
            if not path.is_file():
                there = sorted(p.name.removeprefix("decoder_") for p in self.folder.glob("decoder_*.pth"))
                choices = f"the checkpoint can be {', '.join(there)}" if there else "there is none in that folder"
                raise CheckpointError(f"no checkpoint {path.absolute()}; {choices}")
        return paths

    def save_weights(self, module, suffix: str) -> None:
        """Write encoder and decoder of a `SegmentationModule`; both are on the disk before one takes its name."""
        encoder, decoder = (self.part(name, suffix) for name in ("encoder", "decoder"))
        with atomic_write(encoder) as first, atomic_write(decoder) as second:
            _save(module.encoder.state_dict(), first)
            _save(module.decoder.state_dict(), second)

    def load_epoch(self, module, epoch: int) -> dict:
        """Load the weights of an epoch and return its history (a new one if there is no history file)."""
        encoder, decoder = self.pair(f"epoch_{epoch}.pth")
        with self.offering(f"epoch_{epoch}.pth"):
            load_weights(module.encoder, encoder, what="encoder")
            load_weights(module.decoder, decoder, what="decoder")
        path = self.part("history", f"epoch_{epoch}.pth")
        if not path.is_file():
            return new_history()
        return {**new_history(), **_plain(read_checkpoint(path))}

    def find_resume(self, mode: str, start_epoch: int = 0) -> Path | None:
        """File to continue from, or None to start anew or after `start_epoch`.

        Args:
            mode: 'auto', 'off', 'restart', or a file.
            start_epoch: continue after this epoch, 0 for none.

        Raises:
            CheckpointError: files of a run in the folder would be written over, or there is no such file.
        """
        epochs, there = self.epochs(), self.resume.is_file()
        if start_epoch:
            if epochs and epochs[-1] > start_epoch:
                raise CheckpointError(
                    f"TRAIN.start_epoch {start_epoch} would write over epochs up to {epochs[-1]} in {self.folder}: "
                    f"move them away, or use TRAIN.start_epoch {epochs[-1]}"
                )
            return None
        if mode == "restart":
            return None
        if mode == "auto" and there:
            return self.resume
        if mode == "auto" and epochs:
            raise CheckpointError(
                f"{self.folder} holds epochs up to {epochs[-1]}, but no resume.pth to continue from: add "
                f"TRAIN.start_epoch {epochs[-1]} (and TRAIN.resume off), or TRAIN.resume restart to write over them"
            )
        if mode == "auto":
            return None
        if mode != "off" and not Path(mode).is_file():
            raise CheckpointError(f"TRAIN.resume: there is no file {mode} (or use auto, off, restart)")
        if (there or epochs) and (mode == "off" or Path(mode).resolve() != self.resume.resolve()):
            raise CheckpointError(
                f"{self.folder} already holds a run: add TRAIN.resume auto to continue it, TRAIN.resume restart to "
                f"write over it, or choose another DIR"
            )
        return None if mode == "off" else Path(mode)

    def remove_run(self) -> None:
        """Remove what the run in the folder has written, so that none of it is taken for a new one's; its log stays."""
        weights = (f"{part}_{which}.pth" for part in ("encoder", "decoder") for which in ("epoch_[0-9]*", "best"))
        others = ("history_epoch_[0-9]*.pth", self.resume.name, "curves.png", "vis/epoch_*/**/*.png")
        for pattern in (*weights, *others, "tensorboard/events.*"):
            for path in self.folder.glob(pattern):
                path.unlink()


def read_resume(path: Path) -> dict:
    """State of a run.

    Raises:
        CheckpointError: the file cannot be read or is no such state.
    """
    try:
        state = read_checkpoint(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(state, dict) or not set(STATE) <= set(state):
        raise CheckpointError(f"{path} is no state to continue from (resume.pth), but some other checkpoint")
    return state
