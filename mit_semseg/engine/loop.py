"""The training loop: one step, and the whole run."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..dataset import TrainDataset, ValDataset
from ..dataset.samplers import BatchNumbers
from ..evaluation import AverageMeter, evaluate
from ..evaluation.evaluator import Evaluation
from ..lib.utils import UserError
from .checkpoint import RunFiles, read_resume, save_atomic
from .optim import learning_rates, schedule, set_learning_rates
from .run import Run

logger = logging.getLogger(__name__)

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(UserError, RuntimeError):
    """The loss became infinite or NaN; holds what the message of the run needs."""

    def __init__(self, loss: float, files: Sequence[str]):
        super().__init__(f"the loss is {loss} for the batch {', '.join(files) or '(files unknown)'}")


class TrainingStopped(UserError, RuntimeError):
    """A run that could not go on; the message names step, files and what can be continued from."""


@dataclass(frozen=True)
class Settings:
    """What a run needs to know beside model, optimizer and data; meanings as of the TRAIN options."""

    num_epoch: int = 20
    epoch_iters: int = 5000
    start_epoch: int = 0
    disp_iter: int = 20
    lr_pow: float = 0.9
    warmup_iters: int = 0
    accumulate: int = 1
    clip_grad: float = 0.0
    amp: str = "off"
    channels_last: bool = False
    eval_epoch: int = 0
    checkpoint_iters: int = 1000
    workers: int = 0

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.num_epoch * self.epoch_iters


class Recorder(Protocol):
    """Where figures and pictures of a run go, beside log and history."""

    def step(self, step: int, values: dict[str, float]) -> None: ...
    def picture(self, item: dict, prediction) -> None: ...
    def epoch(self, epoch: int, history: dict, evaluation: Evaluation | None) -> None: ...


def train_step(
    module: nn.Module,
    batches: Sequence[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    device: torch.device,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """One update from the averaged gradients of a few batches.

    Returns:
        Mean loss and mean pixel accuracy, scalars on the device.

    Raises:
        NonFiniteLoss: before the weights were updated.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, accuracies = [], []
    for batch in batches:
        image = batch["img_data"].to(device, non_blocking=True)
        if settings.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        feed = {"img_data": image, "seg_label": batch["seg_label"].to(device, non_blocking=True)}
        with torch.autocast(device.type, dtype=AMP_TYPES.get(settings.amp), enabled=settings.amp != "off"):
            loss, accuracy = module(feed)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(loss.item(), batch.get("info", []))
        scaler.scale(loss / len(batches)).backward()
        losses.append(loss.detach())
        accuracies.append(accuracy)
    if settings.clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), settings.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: TrainDataset,
    files: RunFiles,
    settings: Settings,
    *,
    device: torch.device,
    resume: str = "off",
    val_dataset: ValDataset | None = None,
    recorder: Recorder | None = None,
) -> Run:
    """Train to the end, saving after every epoch.

    Args:
        module: a `SegmentationModule` on `device`.
        resume: 'auto', 'off', 'restart' or a file, see `RunFiles.find_resume`.
        val_dataset: validated every `settings.eval_epoch` epochs.

    Raises:
        CheckpointError: the folder holds a run that would be written over, or the state cannot be read.
        TrainingStopped: the loss is not finite; names step, files and the last good checkpoint.
    """
    run = Run(module, optimizer, device, scale_loss=settings.amp == "fp16")
    _start(run, files, settings, resume)
    if _validation_due(run, settings, val_dataset):  # the run was stopped while it validated
        _end_epoch(run, files, settings, val_dataset, recorder)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=BatchNumbers(run.step * settings.accumulate, settings.total * settings.accumulate),
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws its base seed here, not from the stream of dropout
    )
    batches, clock = iter(loader), _Clock(settings)
    module.train()
    while run.step < settings.total:
        set_learning_rates(optimizer, schedule(run.step, settings.total, settings.lr_pow, settings.warmup_iters))
        chunk = list(islice(batches, settings.accumulate))
        clock.data_arrived()
        try:
            loss, accuracy = train_step(module, chunk, optimizer, run.scaler, device=device, settings=settings)
        except NonFiniteLoss as error:
            raise TrainingStopped(_diverged(error, run, settings, files)) from None
        run.step += 1
        run.loss.update(loss.item())
        run.accuracy.update(accuracy.item())
        clock.step_done()
        if run.step % settings.disp_iter == 0 or run.step % settings.epoch_iters == 0:
            _report(run, settings, clock, recorder)
        if run.step % settings.epoch_iters == 0:
            _end_epoch(run, files, settings, val_dataset, recorder)
        elif settings.checkpoint_iters and run.step % settings.checkpoint_iters == 0:
            save_atomic(run.state(), files.resume)
        clock.resume()
    return run


def _start(run: Run, files: RunFiles, settings: Settings, resume: str) -> None:
    files.folder.mkdir(parents=True, exist_ok=True)
    files.remove_partial()
    path = files.find_resume(resume, settings.start_epoch)
    if settings.start_epoch:
        run.history = files.load_epoch(run.module, settings.start_epoch)
        run.best = max(run.history["val"]["mean_iou"], default=run.best)
        run.step = settings.start_epoch * settings.epoch_iters
        logger.info("continuing after epoch %d: weights and history, fresh optimizer", settings.start_epoch)
    elif path:
        run.restore(read_resume(path))
        logger.info("continuing %s at step %d of %d", path, run.step, settings.total)
        if run.step >= settings.total:
            logger.info("the run in %s is complete: nothing to train", files.folder)
    elif resume == "restart":
        files.remove_run()


def _report(run: Run, settings: Settings, clock: "_Clock", recorder: Recorder | None) -> None:
    """Log line and history point of the steps since the last one."""
    epoch = (run.step - 1) // settings.epoch_iters + 1
    rates = learning_rates(run.optimizer)
    loss, accuracy = run.loss.average(), run.accuracy.average()
    logger.info(
        "Epoch: [%d][%d/%d], Time: %.2f s/step, Data: %.2f, %s, Accuracy: %4.2f %%, Loss: %.6f, remaining %s",
        epoch,
        run.step - (epoch - 1) * settings.epoch_iters,
        settings.epoch_iters,
        clock.step_time.average(),
        clock.data_time.average(),
        ", ".join(f"lr_{part}: {lr:.6f}" for part, lr in rates.items()),
        accuracy * 100,
        loss,
        timedelta(seconds=round(clock.step_time.average() * (settings.total - run.step))),
    )
    for key, value in (("epoch", run.step / settings.epoch_iters), ("loss", loss), ("acc", accuracy)):
        run.history["train"][key].append(value)
    run.loss, run.accuracy = AverageMeter(), AverageMeter()
    if recorder:
        recorder.step(run.step, {"loss": loss, "accuracy": accuracy, **{f"lr_{k}": v for k, v in rates.items()}})


def _end_epoch(
    run: Run, files: RunFiles, settings: Settings, val_dataset: ValDataset | None, recorder: Recorder | None
) -> None:
    """Save weights, history and state; then validate if it is time, and save the figures.

    The weights are safe before the validation starts. A run that is killed while it validates does so again when it is
    continued: see `_validation_due`.
    """
    epoch = run.step // settings.epoch_iters
    files.save_weights(run.module, f"epoch_{epoch}.pth")
    _save(run, files, epoch)
    evaluation = None
    if _validation_due(run, settings, val_dataset):
        evaluation = _validate(run, files, epoch, val_dataset, recorder)
        _save(run, files, epoch)
    if recorder:
        recorder.epoch(epoch, run.history, evaluation)


def _save(run: Run, files: RunFiles, epoch: int) -> None:
    save_atomic(run.history, files.part("history", f"epoch_{epoch}.pth"))
    save_atomic(run.state(), files.resume)


def _validation_due(run: Run, settings: Settings, val_dataset: ValDataset | None) -> bool:
    epoch, rest = divmod(run.step, settings.epoch_iters)
    wanted = val_dataset is not None and settings.eval_epoch and epoch and epoch % settings.eval_epoch == 0
    return bool(wanted and rest == 0 and epoch not in run.history["val"]["epoch"])


def _validate(run: Run, files: RunFiles, epoch: int, dataset: ValDataset, recorder: Recorder | None) -> Evaluation:
    """Score the model, add the figures to the history, and keep the weights if they are the best so far."""
    evaluation = evaluate(run.module, dataset, device=run.device, on_result=recorder.picture if recorder else None)
    iou, accuracy = evaluation.summary.mean_iou, evaluation.summary.pixel_accuracy
    logger.info("Validation after epoch %d: mean IoU %.4f, pixel accuracy %.2f %%", epoch, iou, accuracy * 100)
    for key, value in (("epoch", epoch), ("mean_iou", iou), ("acc", accuracy)):
        run.history["val"][key].append(value)
    if iou > run.best:
        run.best = iou
        files.save_weights(run.module, "best.pth")
    return evaluation


def _diverged(error: NonFiniteLoss, run: Run, settings: Settings, files: RunFiles) -> str:
    epochs = files.epochs()
    last = (
        f"the last good checkpoint is epoch_{epochs[-1]}.pth in {files.folder}" if epochs else "nothing was saved yet"
    )
    if files.resume.is_file():
        last += f", the last state to continue from {files.resume}"
    return (
        f"step {run.step + 1} (epoch {run.step // settings.epoch_iters + 1}, iteration "
        f"{run.step % settings.epoch_iters + 1}): {error}; {last}. The weights were not updated. A smaller "
        f"learning rate, TRAIN.warmup_iters or TRAIN.clip_grad usually help"
    )


class _Clock:
    """Time per step and the part of it spent waiting for data, over the last `disp_iter` steps."""

    def __init__(self, settings: Settings):
        self.window = settings.disp_iter
        self.last = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.step_time, self.data_time = AverageMeter(), AverageMeter()

    def data_arrived(self) -> None:
        if (self.step_time.count or 0) >= self.window:
            self._reset()
        self.data_time.update(time.perf_counter() - self.last)

    def step_done(self) -> None:
        self.step_time.update(time.perf_counter() - self.last)

    def resume(self) -> None:
        """The next step begins now: saving and validation do not count."""
        self.last = time.perf_counter()
