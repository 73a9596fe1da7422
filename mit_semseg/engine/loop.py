"""The training loop: from a network and a data set to the files of a run."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..dataset import TrainDataset, ValDataset
from ..dataset.loader import items, make_loader, worker_errors
from ..dataset.samplers import BatchNumbers
from ..evaluation.inference import DEFAULT_INFERENCE, InferenceOptions
from .checkpoint import RunFolder
from .distributed import Processes, parallel
from .guards import Interruption, Watchdog, deterministic
from .keeper import Clock, Keeper, Recorder
from .optim import schedule, set_learning_rates
from .run import AGAINST_DIVERGENCE, Run, Settings, TrainingStopped, seed_step
from .step import NonFiniteLoss, settle, train_step

logger = logging.getLogger(__name__)

READ_AT_ONCE = ("cpu",)  # devices whose figures are there when a step ends
MOST_PENDING = 100  # steps whose figures may wait elsewhere
MOST_SKIPPED = 25  # steps one after the other that are too large for float16: halving the scale so often does not help


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: TrainDataset,
    files: RunFolder,
    settings: Settings,
    *,
    devices: Sequence[torch.device],
    processes: Processes | None = None,
    resume: str = "off",
    val_dataset: ValDataset | None = None,
    view: InferenceOptions = DEFAULT_INFERENCE,
    recorder: Recorder | None = None,
) -> Run:
    """Train to the end, saving after every epoch.

    Ctrl-C and SIGTERM, in any process, end the run after the step in hand, with its state saved.

    Args:
        module: a `SegmentationModule` on the first of the devices.
        devices: of this process, each of which gets a batch per step; CPU devices may come more than once.
        processes: of the job, see `distributed.join`; None for this one alone. The first one writes the files.
        resume: 'auto', 'off', 'restart' or a file, see `RunFolder.find_resume`.
        val_dataset: validated every `settings.eval_epoch` epochs, shared out over the processes.
        view: of validation, see `evaluation.inference.InferenceOptions`.

    Raises:
        ImageFileError: an image or label cannot be used. Where the data set skips it, the run's `skipped` names it.
        CheckpointError: the folder holds a run that would be written over, or the state cannot be read.
        TrainingStopped: the loss is not finite; names step, files and the last good checkpoint.
        LoaderError, ProcessGroupError: a loader process or another process of the job ended or hangs.
        NondeterministicError: `settings.deterministic`, and an operation has no such form.
        KeyboardInterrupt: a signal ended it.
    """
    processes = processes or Processes(timeout=settings.timeout)
    batches_per_step = len(devices) * processes.size * settings.accumulate
    run = Run(module, optimizer, devices[0], settings, batches=batches_per_step, job=processes.place.job)
    interruption = Interruption()
    keeper = Keeper(run, files, settings, processes, val_dataset, recorder, view, interruption)
    clock = Clock(settings.disp_iter)
    keeper.start(resume, getattr(dataset, "skipped", ()))
    batches = items(_loader(dataset, run.step, settings, devices, processes))
    with interruption, deterministic(settings.deterministic), worker_errors(), Watchdog(processes) as watchdog:
        if keeper.epoch_unfinished():  # the run was stopped while it saved or validated
            keeper.end_epoch(watchdog)
        # None where nothing is left to do: processes that end as soon as they have met may abort in PyTorch.
        runner = parallel(module, devices, processes) if run.step < settings.total else None
        module.train()
        while run.step < settings.total:
            watchdog.progress(f"step {run.step + 1}")
            _take_step(run, runner, batches, clock, devices, processes, settings, interruption.asked)
            # A GPU goes on with the next step while this one's figures are not needed. All processes end after the same
            # step; a signal that comes later waits for the next one.
            ending = run.pending[-1].ending or (processes.size == 1 and interruption.asked)
            if ending or devices[0].type in READ_AT_ONCE or _are_needed(run, keeper):
                _settle(run, settings, processes, files)
            clock.step_done()
            keeper.after_step(clock, watchdog, ending=ending)
            clock.resume()
        keeper.end()
    return run


def _loader(
    dataset: TrainDataset, step: int, settings: Settings, devices: Sequence[torch.device], processes: Processes
) -> DataLoader:
    """Batches of this process's devices from a step on, read ahead."""
    rounds = range(step * settings.accumulate, settings.total * settings.accumulate)
    first, total = len(devices) * processes.rank, len(devices) * processes.size
    loader = make_loader(
        dataset,
        workers=settings.workers,
        timeout=settings.timeout,
        processes=processes.place.local_size,
        batch_size=None,
        sampler=BatchNumbers(rounds.start, rounds.stop, first, len(devices), total),
        pin_memory=devices[0].type == "cuda",
    )
    logger.info("%d loader processes", loader.num_workers)
    return loader


def _take_step(
    run: Run,
    runner: nn.Module,
    batches: Iterator[dict],
    clock: Clock,
    devices: Sequence[torch.device],
    processes: Processes,
    settings: Settings,
    ending: bool,
) -> None:
    """The next step, whose figures may still be on their way."""
    rates = schedule(run.step, settings.total, settings.lr_pow, settings.warmup_iters)
    set_learning_rates(run.optimizer, rates)
    seed_step(settings.seed, run.step, devices, len(devices) * processes.rank)
    chunks = [list(islice(batches, len(devices))) for _ in range(settings.accumulate)]
    clock.data_arrived()
    for batch in chain.from_iterable(chunks):
        run.note_classes(batch["seg_label"])
    run.leave_out(sentence for chunk in chunks for batch in chunk for sentence in batch.get("skipped", ()))
    where = {
        "devices": devices,
        "processes": processes,
        "settings": settings,
        "loss": run.module.crit,
        "ending": ending,
    }
    run.pending.append(train_step(runner, chunks, run.optimizer, run.scaler, **where))
    run.step += 1


def _are_needed(run: Run, keeper: Keeper) -> bool:
    return len(run.pending) == MOST_PENDING or keeper.needs_figures()


def _settle(run: Run, settings: Settings, processes: Processes, files: RunFolder) -> None:
    """Read the figures of the steps done since the last time.

    Raises:
        TrainingStopped: the loss of a step is not finite, or too many steps were skipped.
    """
    try:
        figures = settle(run.pending, processes)
    except NonFiniteLoss as error:
        raise TrainingStopped(_diverged(error, run, settings, files)) from None
    for step in run.pending:
        run.skipped_steps += step.skipped
        run.skipped_in_a_row = run.skipped_in_a_row + 1 if step.skipped else 0
        run.labelled += step.labelled
    if run.skipped_in_a_row >= MOST_SKIPPED:
        raise TrainingStopped(
            f"step {run.step}: {run.skipped_in_a_row} steps one after the other were too large for float16 and "
            f"skipped; {files.last_saved()}. TRAIN.amp bf16 has the range of float32; a smaller learning rate, or "
            f"TRAIN.amp off, may help as well"
        )
    run.pending.clear()
    for loss, accuracy in figures:
        run.loss.update(loss)
        run.accuracy.update(accuracy)


def _diverged(error: NonFiniteLoss, run: Run, settings: Settings, files: RunFolder) -> str:
    step = run.step - error.steps
    epoch, iteration = divmod(step - 1, settings.epoch_iters)
    return (
        f"step {step} (epoch {epoch + 1}, iteration {iteration + 1}): {error}; {files.last_saved()}. Nothing of this "
        f"step was saved. {AGAINST_DIVERGENCE}"
    )
