"""Save, load and lock the files of a training run: weights, history and the checkpoint to resume from."""

import json
import logging
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout

from ..lib.utils import HOST, UTF8, UserError, atomic_write, shorten_list
from ..models.weight_files import WeightsError, read_checkpoint, stored_temperature
from ..models.weights import is_whole_network, load_weights
from .distributed import World

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 15.0  # seconds to wait for the lock; DataLoader workers of a killed run keep it for a while
STATE = ("step", "best_iou", "history", "metrics", "encoder", "decoder", "optimizer", "optimizer_name", "scaler")
PARTS = ("encoder", "decoder", "history")


class CheckpointError(UserError, RuntimeError):
    """A training run cannot start or resume, or a checkpoint cannot be loaded."""


def new_history() -> dict:
    """Return empty training and validation curves. `epoch` is the position of every point, in epochs, e.g. 2.5."""
    return {"train": {"epoch": [], "loss": [], "acc": []}, "val": {"epoch": [], "loss": [], "mean_iou": [], "acc": []}}


def complete_history(saved: dict) -> dict:
    """Return saved curves; the validation losses are NaN if an earlier version saved the curves."""
    history = new_history() | saved
    losses = history["val"].setdefault("loss", [])
    losses[:0] = [math.nan] * (len(history["val"]["epoch"]) - len(losses))
    return history


def temperature_file(path: Path) -> Path:
    """Return the path of the temperature of a file with weights: `temperature_best.json` for `best.pth`."""
    return path.with_name(f"temperature_{path.stem}.json")


def save_atomic(obj, path: Path) -> None:
    """Save an object with `torch.save` to a temporary file, then rename this file to `path`."""
    with atomic_write(path) as partial:
        _save(obj, partial)


def _save(obj, path: Path) -> None:
    with open(path, "wb") as out:
        torch.save(obj, out)
        out.flush()
        os.fsync(out.fileno())


class RunFolder:
    """Folder of a training run (option DIR).

    State dicts are in `encoder_<suffix>` and `decoder_<suffix>`, where the suffix is `epoch_N.pth` or `best.pth`. With
    TRAIN.ema, these files contain averaged weights; the weights themselves have the suffix `epoch_N_raw.pth` or
    `best_raw.pth`. The curves are in `history_epoch_N.pth`. The checkpoint to resume from is `resume.pth`.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.resume = self.folder / "resume.pth"

    def path(self, part: str, suffix: str) -> Path:
        """Return the path of a file. `part` is encoder, decoder or history; `suffix` is for example `epoch_20.pth`."""
        return self.folder / f"{part}_{suffix}"

    def epochs(self) -> list[int]:
        """Return the numbers of the epochs whose weights are in the folder, in ascending order."""
        names = (re.fullmatch(r"decoder_epoch_(\d+)\.pth", p.name) for p in self.folder.glob("decoder_epoch_*.pth"))
        return sorted(int(match[1]) for match in names if match)

    def weight_files(self, suffix: str) -> tuple[Path, Path]:
        """Return the path of the encoder weights and the path of the decoder weights.

        Args:
            suffix: for example `epoch_20.pth`; or the path of a file with the whole network, which is returned twice.

        Raises:
            CheckpointError: a file does not exist, or the file at the given path contains only a part of a network.
        """
        paths = self.path("encoder", suffix), self.path("decoder", suffix)
        if whole := self._whole_file(suffix):
            if not is_whole_network(whole):
                raise CheckpointError(
                    f"{whole} does not contain a whole network; for encoder and decoder files in {self.folder}, give "
                    f"only the suffix, e.g. epoch_20.pth"
                )
            return whole, whole
        if len(Path(suffix).parts) > 1:
            raise CheckpointError(f"checkpoint {Path(suffix).absolute()} does not exist; give an existing file")
        for path in paths:
            if not path.is_file():
                found = sorted(p.name.removeprefix("decoder_") for p in self.folder.glob("decoder_*.pth"))
                choices = f"choose one of {', '.join(found)}" if found else f"{self.folder} contains no checkpoints"
                raise CheckpointError(f"checkpoint {path.absolute()} does not exist; {choices}")
        return paths

    def _whole_file(self, suffix: str) -> Path | None:
        """Return `suffix` if it is the path of a file, and not the suffix of files in this folder; otherwise None."""
        in_folder = any(self.path(part, suffix).is_file() for part in ("encoder", "decoder"))
        return Path(suffix) if not in_folder and Path(suffix).is_file() else None

    def temperature_path(self, suffix: str) -> Path:
        """Return the path of the temperature of a checkpoint, e.g. `temperature_best.json`; see `weight_files`."""
        return temperature_file(self._whole_file(suffix) or self.folder / suffix)

    def read_temperature(self, suffix: str) -> float:
        """Return the temperature of a checkpoint, by which inference divides logits; 1 if none was fitted."""
        path = self.temperature_path(suffix)
        if not path.is_file():
            whole = self._whole_file(suffix)
            return stored_temperature(whole) if whole else 1.0
        try:
            value = float(json.loads(path.read_text(**UTF8))["temperature"])
        except (ValueError, KeyError, TypeError):
            value = math.nan
        if not 0 < value < math.inf:
            raise CheckpointError(f"{path} does not contain a positive temperature; delete the file")
        return value

    def describe_saved(self) -> str:
        """Return text for error messages that lists the saved checkpoints."""
        names = [*(f"epoch_{epoch}.pth" for epoch in self.epochs()), *(["resume.pth"] if self.resume.is_file() else [])]
        return f"{self.folder} contains {shorten_list(names[::-1])}" if names else "no checkpoint was saved yet"

    @contextmanager
    def naming_checkpoints(self) -> Iterator[None]:
        """Context that converts `WeightsError` to `CheckpointError` and adds a list of the saved checkpoints."""
        try:
            yield
        except WeightsError as error:
            raise CheckpointError(f"{error}; {self.describe_saved()}") from None

    def find_resume(self, mode: str, start_epoch: int = 0) -> Path | None:
        """Return the checkpoint to resume from, or None for a run that starts from scratch or from `start_epoch`.

        Args:
            mode: TRAIN.resume, which is 'auto', 'off', 'restart' or the path of a checkpoint.
            start_epoch: TRAIN.start_epoch, the saved epoch from which training continues; 0 if only `mode` applies.

        Raises:
            CheckpointError: files of an existing run would be overwritten, or the checkpoint does not exist.
        """
        epochs, exists = self.epochs(), self.resume.is_file()
        if start_epoch:
            if epochs and epochs[-1] > start_epoch:
                raise CheckpointError(
                    f"TRAIN.start_epoch {start_epoch} would overwrite later epochs in {self.folder} (the last is "
                    f"{epochs[-1]}); move their files to another folder, or set TRAIN.start_epoch {epochs[-1]}"
                )
            return None
        if mode == "restart":
            return None
        if mode == "auto":
            if epochs and not exists:
                raise CheckpointError(
                    f"{self.folder} has weights up to epoch {epochs[-1]} but no resume.pth; to continue from these "
                    f"weights, set TRAIN.resume off and TRAIN.start_epoch {epochs[-1]}; to delete all saved weights "
                    f"and start from scratch, set TRAIN.resume restart"
                )
            return self.resume if exists else None
        if mode != "off" and not Path(mode).is_file():
            raise CheckpointError(
                f"TRAIN.resume: file {mode} does not exist; set TRAIN.resume to an existing file, auto, off or restart"
            )
        if (exists or epochs) and (mode == "off" or Path(mode).resolve() != self.resume.resolve()):
            raise CheckpointError(
                f"{self.folder} already contains a run; set TRAIN.resume auto to resume this run, TRAIN.resume restart "
                f"to delete this run and start from scratch, or another DIR"
            )
        return None if mode == "off" else Path(mode)

    def check_epoch_length(self, step: int, epoch_iters: int) -> None:
        """Raise `CheckpointError` if a larger `epoch_iters` than in the saved run would overwrite saved epochs."""
        epochs, epoch = self.epochs(), step // epoch_iters
        if epochs and epochs[-1] > epoch:
            raise CheckpointError(
                f"{self.folder} has weights up to epoch {epochs[-1]}, but step {step} with TRAIN.epoch_iters "
                f"{epoch_iters} is in epoch {epoch + 1}; set TRAIN.epoch_iters as in the saved run, or move the "
                f"weights of later epochs to another folder"
            )

    def save_weights(self, module, suffix: str) -> None:
        """Save encoder and decoder of a `SegmentationModule`; existing files are replaced after both were written."""
        with (
            atomic_write(self.path("encoder", suffix)) as encoder,
            atomic_write(self.path("decoder", suffix)) as decoder,
        ):
            _save(module.encoder.state_dict(), encoder)
            _save(module.decoder.state_dict(), decoder)
        self.temperature_path(suffix).unlink(missing_ok=True)  # it was fitted to the replaced weights

    def load_epoch(self, module, epoch: int) -> dict:
        """Load the weights of an epoch into a network. Return the saved history, or an empty history without a file."""
        suffix = f"epoch_{epoch}.pth"
        with self.naming_checkpoints():
            for part, path in zip(("encoder", "decoder"), self.weight_files(suffix), strict=True):
                load_weights(getattr(module, part), path, name=part, part=part)
        path = self.path("history", suffix)
        curves = read_checkpoint(path) if path.is_file() else {}
        return complete_history(
            {
                part: {
                    key: [x.item() if isinstance(x, np.generic) else x for x in points] for key, points in lines.items()
                }
                for part, lines in curves.items()
            }
        )

    def remove_run(self) -> None:
        """Remove all files of the run from the folder, except the log."""
        weights = (f"{part}_{which}.pth" for part in PARTS for which in ("epoch_[0-9]*", "best", "best_raw"))
        for pattern in (
            *weights,
            "temperature_epoch_[0-9]*.json",
            "temperature_best*.json",
            "logger_run.json",
            self.resume.name,
            "curves.png",
            "vis/epoch_*/**/*.png",
            "tensorboard/events.*",
        ):
            for path in self.folder.glob(pattern):
                path.unlink()

    def remove_partial(self) -> None:
        """Remove the temporary files of an interrupted run. The caller must have locked the folder."""
        for pattern in ("*.pth.*.partial", "curves.png.*.partial", "vis/epoch_*/**/*.partial"):
            for path in self.folder.glob(pattern):
                logger.info("removing temporary file %s of an interrupted run", path)
                path.unlink()

    @contextmanager
    def locked(self, world: World) -> Iterator[None]:
        """Context that locks the folder for one training run; all ranks must enter the context.

        Raises:
            CheckpointError: another run holds the lock; the message names the process and host of that run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock, holder, other = FileLock(self.folder / ".lock"), self.folder / ".lock_holder", ""
        if world.is_main:
            try:
                lock.acquire(timeout=LOCK_TIMEOUT)
                holder.write_text(f"{os.getpid()} on {HOST}", **UTF8)
            except Timeout:
                other = holder.read_text(**UTF8) if holder.is_file() else "unknown"
        if other := world.gather(other, "locking DIR")[0]:
            raise CheckpointError(
                f"another training run (process {other}) uses {self.folder}; wait until that run ends, stop that run, "
                f"or set another DIR. To start several ranks of one run, use torchrun"
            )
        try:
            yield
        finally:
            if world.is_main:
                holder.unlink(missing_ok=True)
                lock.release()


def read_resume(path: Path) -> dict:
    """Read a checkpoint to resume from; raise `CheckpointError` if the file is damaged or of another kind."""
    with RunFolder(path.parent).naming_checkpoints():
        state = read_checkpoint(path)
    if not isinstance(state, dict) or not set(STATE) <= set(state):
        raise CheckpointError(f"{path} is not a checkpoint to resume from; set TRAIN.resume to a resume.pth file")
    return state


def trainer_state(trainer: "Trainer") -> dict:
    """Return the state for a bit-identical resume. All random numbers depend only on seed and step."""
    return {
        "step": trainer.step,
        "best_iou": trainer.best_iou,
        "history": trainer.history,
        "metrics": trainer.metrics.totals.tolist(),
        "encoder": trainer.module.encoder.state_dict(),
        "decoder": trainer.module.decoder.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "optimizer_name": type(trainer.optimizer).__name__,
        "scaler": trainer.scaler.state_dict(),
        "average": trainer.average.state() if trainer.average else None,
        "batches": trainer.world.num_devices * trainer.options.accumulate,
        "amp": trainer.options.amp,
        "job": trainer.world.job,
        "options": dict(trainer.options.run_options),
        "skipped": list(trainer.skipped),
        "overflows": (trainer.overflows, trainer.overflows_in_a_row),
    }


def restore_trainer(trainer: "Trainer", state: dict) -> None:
    """Restore the result of `trainer_state`. Learning rates, momentum and weight decay keep their current values.

    Raises:
        CheckpointError: the state was saved with another model or optimizer.
    """
    saved, options = state.get("options", {}), trainer.options.run_options
    norms = [values.get("MODEL.norm", "sync") for values in (saved, options)]
    try:
        if norms[0] != norms[1] and "inplace" in norms:  # the state dict keys are equal, but the layers differ
            raise RuntimeError
        trainer.module.encoder.load_state_dict(state["encoder"])
        trainer.module.decoder.load_state_dict(state["decoder"])
    except RuntimeError:
        raise CheckpointError(
            f"the checkpoint was saved with another model (saved: {_describe_model(saved)}; now: "
            f"{_describe_model(options)}); set the MODEL options and DATASET.num_class to the saved values, or start "
            f"from scratch with TRAIN.resume restart"
        ) from None
    _restore_optimizer(trainer.optimizer, state)
    if state["scaler"] and state.get("amp") == trainer.options.amp:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.best_iou = state["step"], state["best_iou"]
    trainer.history = complete_history(state["history"])
    totals = trainer.metrics.totals
    totals.copy_(torch.tensor(state["metrics"], dtype=totals.dtype))
    trainer.skipped = dict.fromkeys(state["skipped"])
    trainer.overflows, trainer.overflows_in_a_row = state["overflows"]
    batches = trainer.world.num_devices * trainer.options.accumulate
    if state["batches"] != batches:
        logger.warning(
            "the checkpoint was saved with %d batches per step (devices times TRAIN.accumulate), but this run has %d; "
            "consider changing the learning rates",
            state["batches"],
            batches,
        )
    if changed := [key for key, value in options.items() if saved.get(key, value) != value]:
        values = (f"{key} {reprlib.repr(options[key])} (was {reprlib.repr(saved[key])})" for key in changed)
        logger.info("options changed since the checkpoint: %s", ", ".join(values))


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    own, saved, name = optimizer.state_dict(), state["optimizer"], type(optimizer).__name__
    sizes = [[len(group["params"]) for group in groups["param_groups"]] for groups in (own, saved)]
    if sizes[0] != sizes[1] or state["optimizer_name"] != name:
        raise CheckpointError(
            f"the checkpoint was saved with another optimizer (saved: {state['optimizer_name']} for {sum(sizes[1])} "
            f"tensors; now: {name} for {sum(sizes[0])} tensors); set TRAIN.optim, TRAIN.fix_bn and TRAIN.lr_decay as "
            f"in the saved run, do not change TRAIN.lr_encoder or TRAIN.lr_decoder from or to 0, or start from scratch "
            f"with TRAIN.resume restart"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
    # Fused optimizers need the state in the memory format of the parameter, which depends on TRAIN.channels_last.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _describe_model(options: Mapping[str, object]) -> str:
    """Return a description of the model, e.g. `mobilenetv2dilated + c1_deepsup, 11 classes, MODEL.norm sync`."""
    if "MODEL.arch_encoder" not in options:
        return "unknown"
    name = f"{options['MODEL.arch_encoder']} + {options['MODEL.arch_decoder']}, {options['DATASET.num_class']} classes"
    stride = f", output stride {options['MODEL.output_stride']}" if options.get("MODEL.output_stride") else ""
    return f"{name}{stride}, MODEL.norm {options['MODEL.norm']}"
