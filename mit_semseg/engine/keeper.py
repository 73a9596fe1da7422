"""What happens between the steps of a run: log, history, checkpoints, validation."""

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from ..dataset import ValDataset
from ..dataset.classes import ONE_CLASS_WARNING
from ..evaluation import AverageMeter, evaluate
from ..evaluation.evaluator import Evaluation
from ..evaluation.inference import DEFAULT_INFERENCE, InferenceOptions
from .checkpoint import CheckpointError, RunFolder, read_resume, save_atomic
from .distributed import Processes, share_buffers
from .guards import Interruption, Watchdog
from .optim import learning_rates
from .run import AGAINST_DIVERGENCE, Run, Settings, TrainingStopped

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Where figures and pictures of a run go, beside log and history."""

    def step(self, step: int, values: dict[str, float]) -> None: ...
    def picture(self, epoch: int, item: dict, prediction) -> None: ...
    def epoch(self, epoch: int, history: dict, evaluation: Evaluation | None) -> None: ...


class Keeper:
    """Keeps what a run has reached. All processes call it alike, the main one writes.

    Args:
        run: kept.
        files: where.
        settings: how often.
        processes: of the job.
        val_dataset: to validate on, shared out over the processes.
        recorder: of this process; steps and epochs are the main one's.
        view: of validation.
        interruption: that ends the run; the state is saved before.
    """

    def __init__(
        self,
        run: Run,
        files: RunFolder,
        settings: Settings,
        processes: Processes,
        val_dataset: ValDataset | None = None,
        recorder: Recorder | None = None,
        view: InferenceOptions = DEFAULT_INFERENCE,
        interruption: Interruption | None = None,
    ):
        self.interruption = interruption or Interruption(active=False)
        self.run, self.files, self.settings, self.processes = run, files, settings, processes
        self.val_dataset, self.recorder, self.view = val_dataset, recorder, view
        self._continues_here = False

    def start(self, resume: str, skipped: Sequence[str] = ()) -> None:
        """Prepare the folder, and continue the run in it if asked to; see `RunFolder.find_resume`.

        Args:
            resume: as of `find_resume`.
            skipped: sentences about what the list has that cannot be used.
        """
        run, files, settings = self.run, self.files, self.settings
        path = files.find_resume(resume, settings.start_epoch)
        if self.processes.main:
            files.folder.mkdir(parents=True, exist_ok=True)
            files.remove_partial()
        if settings.start_epoch:
            run.history = files.load_epoch(run.module, settings.start_epoch)
            run.best = max(run.history["val"]["mean_iou"], default=run.best)
            run.step = settings.start_epoch * settings.epoch_iters
            logger.info("continuing after epoch %d: weights and history, fresh optimizer", settings.start_epoch)
        elif path:
            run.restore(self._readable(path))
            self._continues_here = path.resolve() == files.resume.resolve()
            files.check_numbers(run.step, settings.epoch_iters)
            logger.info("continuing %s at step %d of %d", path, run.step, settings.total)
            if run.step >= settings.total:
                logger.info("the run in %s is complete: nothing to train", files.folder)
        elif resume == "restart" and self.processes.main:
            files.remove_run()
        places = self.processes.collect((str(files.folder.absolute()), run.step), "comparing where to start")
        if len({step for _, step in places}) > 1:
            seen = "; ".join(f"rank {rank} is at step {step} of {folder}" for rank, (folder, step) in enumerate(places))
            raise CheckpointError(f"the processes do not agree where to start ({seen}): DIR must be one folder for all")
        run.leave_out(skipped)

    def _readable(self, path: Path) -> dict:
        """The state in a file; where it is damaged, the error says what else there is to continue from."""
        try:
            return read_resume(path)
        except CheckpointError as error:
            epoch = self.files.last_whole()
            if not epoch:
                raise
            raise CheckpointError(
                f"{error}; the weights of epoch {epoch} are there: TRAIN.resume off TRAIN.start_epoch {epoch} goes on "
                f"from them{', with later epochs moved away' if epoch < self.files.epochs()[-1] else ''}"
            ) from None

    def after_step(self, clock: "Clock", watchdog: Watchdog, *, ending: bool = False) -> None:
        """Whatever is due after the step that was just done.

        Raises:
            KeyboardInterrupt: the run is ending; the state of this step has been saved.
        """
        report, save, end = self._due()
        if report:
            self._report(clock)
        if end and not ending:
            self.end_epoch(watchdog)
        elif save or end or ending:
            self._save_state()  # what is missing of an epoch is done when the run goes on, see `epoch_unfinished`
        if ending:
            self.processes.collect(None, "waiting for the last files")
            self.interruption.carry_out(anyway=True)

    def needs_figures(self) -> bool:
        """Whether something is due after the last step that needs to know its loss."""
        return any(self._due())

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether a report, a save inside the epoch, or the end of the epoch is."""
        step, settings = self.run.step, self.settings
        end = step % settings.epoch_iters == 0
        save = bool(settings.checkpoint_iters) and step % settings.checkpoint_iters == 0
        return step % settings.disp_iter == 0 or end, save, end

    def _report(self, clock: "Clock") -> None:
        """Log line and history point of the steps since the last one."""
        run, settings = self.run, self.settings
        if not run.loss.initialized:
            logger.info("step %d: all steps since the last line were skipped (too large for float16)", run.step)
            return
        if not run.labelled:
            logger.warning("step %d: no pixel was labelled since the last line: nothing is learnt from that", run.step)
        if len(run.classes) == 1 and not run.history["train"]["epoch"]:
            logger.warning(ONE_CLASS_WARNING.format(f"number {min(run.classes)} so far"))
        run.labelled = 0.0
        epoch = (run.step - 1) // settings.epoch_iters + 1
        rates = learning_rates(run.optimizer)
        loss, accuracy = run.loss.average(), run.accuracy.average()
        logger.info(
            "Epoch: [%d][%d/%d], Time: %.2f s/step, Data: %.2f, %s, Accuracy: %4.2f %%, Loss: %.6f, remaining %s%s",
            epoch,
            run.step - (epoch - 1) * settings.epoch_iters,
            settings.epoch_iters,
            clock.step_time.average(),
            clock.data_time.average(),
            ", ".join(f"lr_{part}: {lr:.6f}" for part, lr in rates.items()),
            accuracy * 100,
            loss,
            timedelta(seconds=round(clock.step_time.average() * (settings.total - run.step))),
            f", {run.skipped_steps} steps skipped (too large for float16)" if run.skipped_steps else "",
        )
        for key, value in (("epoch", run.step / settings.epoch_iters), ("loss", loss), ("acc", accuracy)):
            run.history["train"][key].append(value)
        run.loss, run.accuracy = AverageMeter(), AverageMeter()
        if self.recorder:
            values = {"loss": loss, "accuracy": accuracy, **{f"lr_{k}": v for k, v in rates.items()}}
            self.recorder.step(run.step, values)

    def end_epoch(self, watchdog: Watchdog) -> None:
        """Save weights, history and state; then validate if it is time, and save the figures.

        The weights are safe before the validation starts. A run that is killed in the middle of all this does it again
        when it is continued: see `epoch_unfinished`.
        """
        epoch = self.run.step // self.settings.epoch_iters
        self._save_state()
        self._save_weights(f"epoch_{epoch}.pth")
        self._save_history(epoch)
        evaluation = None
        if self._validation_due():
            evaluation = self._validate(epoch, watchdog)
            self._save_history(epoch)
            self._save_state()
        if self.recorder:
            self.recorder.epoch(epoch, self.run.history, evaluation)

    def epoch_unfinished(self) -> bool:
        """Whether an epoch has just ended of which a file or the validation is missing."""
        epoch, rest = divmod(self.run.step, self.settings.epoch_iters)
        if rest or not epoch:
            return False
        paths = [self.files.part(name, f"epoch_{epoch}.pth") for name in ("encoder", "decoder", "history")]
        missing = self._continues_here and not all(path.is_file() for path in paths)
        return self.processes.collect(missing or self._validation_due(), "looking for files")[0]

    def _validation_due(self) -> bool:
        epoch, rest = divmod(self.run.step, self.settings.epoch_iters)
        every = self.settings.eval_epoch if self.val_dataset is not None else 0
        return bool(every and epoch and rest == epoch % every == 0 and epoch not in self.run.history["val"]["epoch"])

    def _validate(self, epoch: int, watchdog: Watchdog) -> Evaluation:
        """Score the model, add the figures to the history, and keep the weights if they are the best so far.

        Every process scores its share of the pictures, without exchanging anything before its end.
        """
        run, processes = self.run, self.processes
        share_buffers(run.module, processes)

        def seen(item, prediction):
            watchdog.progress("validation")
            self.interruption.carry_out()  # the state was saved before
            if self.recorder and prediction is not None:
                self.recorder.picture(epoch, item, prediction)

        share = evaluate(
            run.module,
            self.val_dataset.shard(processes.rank, processes.size),
            device=run.device,
            view=self.view,
            workers=self.settings.workers,
            timeout=self.settings.timeout,
            processes=processes.place.local_size,
            progress=processes.main,
            on_result=seen,
        )
        evaluation = Evaluation.merged(processes.collect(share, "validation", patient=True))
        run.leave_out(evaluation.skipped)
        summary = evaluation.summary
        iou, accuracy, present = summary.mean_iou, summary.pixel_accuracy, summary.mean_iou_present
        scores = f"mean IoU {iou:.4f} ({present:.4f} over the classes present), pixel accuracy {accuracy * 100:.2f} %"
        skipped = f", {len(evaluation.skipped)} left out" if evaluation.skipped else ""
        logger.info("Validation after epoch %d: %s%s", epoch, scores, skipped)
        if evaluation.only_class:
            logger.warning(ONE_CLASS_WARNING.format(evaluation.only_class))
        for key, value in (("epoch", epoch), ("mean_iou", iou), ("acc", accuracy)):
            run.history["val"][key].append(value)
        if iou > run.best:
            run.best = iou
            self._save_weights("best.pth")
        return evaluation

    def _save_weights(self, suffix: str) -> None:
        if self.processes.main:
            self.files.save_weights(self.run.module, suffix)

    def _save_history(self, epoch: int) -> None:
        if self.processes.main:
            save_atomic(self.run.history, self.files.part("history", f"epoch_{epoch}.pth"))

    def end(self) -> None:
        """Wait for the last files, and say what was left out."""
        self._share_left_out("waiting for the last files")
        if self.run.skipped:
            sentences = "\n  ".join(self.run.skipped)
            logger.warning("%d left out in this run:\n  %s", len(self.run.skipped), sentences)

    def _share_left_out(self, doing: str) -> None:
        for sentences in self.processes.collect(list(self.run.skipped), doing):
            self.run.skipped |= dict.fromkeys(sentences)

    def _save_state(self) -> None:
        names = self.processes.collect(self.run.not_finite(), "looking at the weights")
        if name := next(filter(None, names), ""):
            raise TrainingStopped(
                f"step {self.run.step}: {name} is not finite any more, so nothing of this step was saved; "
                f"{self.files.last_saved()}. {AGAINST_DIVERGENCE}"
            )
        self._share_left_out("saving")
        if self.processes.main:
            save_atomic(self.run.state(), self.files.resume)


class Clock:
    """Time per step and the part of it spent waiting for data, over the last steps.

    Args:
        window: number of those steps.
    """

    def __init__(self, window: int):
        self.window = window
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
