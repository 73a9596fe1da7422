"""The trainer, which runs the training loop and holds the model, the optimizer and the counters of a run."""

import faulthandler
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import chain, islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ..dataset import TrainDataset, ValDataset
from ..dataset.classes import ONE_CLASS_WARNING
from ..dataset.loader import iterate, make_loader, worker_errors
from ..dataset.transforms import images_to_device
from ..evaluation import InferenceOptions, Predictor, evaluate
from ..evaluation.evaluator import Evaluation, LoadOptions
from ..lib.utils import UserError
from .checkpoint import (
    CheckpointError,
    RunFolder,
    new_history,
    read_resume,
    restore_trainer,
    save_atomic,
    trainer_state,
)
from .distributed import World, broadcast_buffers, parallelize
from .optim import learning_rates, lr_factor, set_learning_rates
from .signals import StopSignals
from .train_step import (
    AMP_DTYPES,
    BufferSnapshot,
    LossWeights,
    RunningMetrics,
    StepTimer,
    TrainingOptions,
    cudnn_benchmark,
    deterministic_algorithms,
    image_loss,
    seed_step,
    weighted_sum,
)
from .weight_average import WeightAverage

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 25  # the run stops after this many skipped fp16 steps in a row; each step halves the loss scale


class TrainingStopped(UserError, RuntimeError):
    """Training cannot continue. The message names the step and the saved checkpoints."""


class Trainer:
    """Trains a network, validates it and saves checkpoints. Every rank has a trainer; rank 0 saves the checkpoints.

    Args:
        module: `SegmentationModule` on the first device of `world`.
        optimizer: optimizer of the module's parameters, see `build_optimizer`.
        folder: folder of the checkpoints.
        options: training options.
        world: ranks and devices, see `distributed.join`. By default this process trains on the CPU.

    Attributes:
        step: number of completed training steps.
        history: training and validation curves, see `checkpoint.new_history`.
        best_iou: best validation mean IoU so far, -1 before the first validation.
        average: moving average of the weights; None without `ema`.
        encoder_parameters: parameters of the encoder that are trained after the first `freeze_encoder` steps.
        skipped: dict whose keys are messages about unusable images (DATASET.on_error skip).
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: RunFolder,
        options: TrainingOptions,
        world: World | None = None,
    ):
        self.module, self.optimizer, self.folder, self.options = module, optimizer, folder, options
        self.world = world or World()
        self.device = self.world.devices[0]
        self.model = module  # `fit` replaces this with the result of `parallelize`
        # The scaler skips updates with nonfinite gradients, without synchronizing. Without fp16, the scale starts at 1
        # and halves with every skipped update, so that `log` can count them.
        fp16 = options.amp == "fp16"
        constant = {} if fp16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16 or self.device.type != "mps", **constant)
        self.step, self.best_iou, self.history = 0, -1.0, new_history()
        self.average = WeightAverage(module, options.ema) if options.ema else None
        self.encoder_parameters = [p for p in module.encoder.parameters() if p.requires_grad]
        self.metrics, self.timer = RunningMetrics(self.device), StepTimer()
        self.overflows, self.overflows_in_a_row = 0, 0
        self.labelled_pixels, self.classes_seen = 0.0, set()
        self.image_names: dict[int, list[Sequence[str]]] = {}  # step -> image names of every batch
        self.skipped: dict[str, None] = {}
        self.signals = StopSignals()
        self.resumed_in_place = False
        self.val_dataset: ValDataset | None = None
        self.inference, self.run_logger = InferenceOptions(), None

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.step // self.options.epoch_iters

    def completed_by(self) -> str:
        """Return why the run is complete, or '' if it is not."""
        ious, patience = self.history["val"]["mean_iou"], self.options.patience
        if self.step >= self.options.total_steps:
            return f"all {self.options.num_epoch} epochs are trained"
        if patience and ious and len(ious) - 1 - ious.index(max(ious)) >= patience:
            return f"no better mean IoU than {max(ious):.4f} in the last {patience} validations (TRAIN.patience)"
        return ""

    def fit(
        self,
        dataset: TrainDataset,
        val_dataset: ValDataset | None = None,
        *,
        resume: str = "off",
        inference: InferenceOptions | None = None,
        run_logger=None,
    ) -> None:
        """Train until the last epoch and save a checkpoint after every epoch.

        After SIGINT or SIGTERM on any rank, all ranks stop after the same step, and rank 0 saves a checkpoint. Other
        failures raise a `UserError` that names the image, checkpoint, step, worker or rank that failed.

        Args:
            dataset: training batches; every element is a batch for one device.
            val_dataset: validation set, evaluated every `eval_epoch` epochs and sharded over the ranks.
            resume: 'auto', 'off', 'restart' or the path of a checkpoint, see `RunFolder.find_resume`.
            inference: inference options for validation.
            run_logger: object with the methods of `cli.run_logger.RunLogger`, or None.
        """
        options, self.val_dataset, self.run_logger = self.options, val_dataset, run_logger
        self.inference = inference or self.inference
        self.start(resume)
        self.report_skipped(getattr(dataset, "skipped", ()))
        loader = iterate(self.make_loader(dataset))
        benchmark = getattr(dataset, "has_fixed_shape", False) and not options.deterministic
        with self.signals, deterministic_algorithms(options.deterministic), worker_errors():
            if self.resumed_in_place and self.step % options.epoch_iters == 0:
                self.end_epoch()  # the run may have been stopped before the epoch was saved and validated
            if not self.completed_by():
                self.prepare_model()
            while not self.completed_by():
                self.watch()
                micro_batches = [list(islice(loader, len(self.world.devices))) for _ in range(options.accumulate)]
                self.timer.data_loaded()
                set_learning_rates(self.optimizer, lr_factor(self.step, options))
                weights = LossWeights(micro_batches, self.module.crit, self.world, self.signals.received)
                self.note_batches(micro_batches, weights)
                seed_step(options.seed, self.step, self.world)
                with self.world.communicating("training step"), cudnn_benchmark(benchmark):
                    self.train_step([self.to_devices(batches) for batches in micro_batches], weights)
                self.step += 1
                if self.step == options.freeze_encoder:
                    self.prepare_model()
                self.timer.step_done()
                stop = weights.stop or (self.world.size == 1 and self.signals.received)
                end = self.step % options.epoch_iters == 0
                if end or self.step % options.disp_iter == 0:
                    self.log()
                if end and not stop:
                    self.end_epoch()
                elif end or stop or (options.checkpoint_iters and self.step % options.checkpoint_iters == 0):
                    self.save()
                if stop:
                    self.stop()
                self.timer.start()
        self.finish()

    def train_step(self, micro_batches: Sequence[Sequence[dict]], weights: LossWeights) -> None:
        """Update the weights once, with the gradient of the mean loss over all devices and ranks.

        If the loss or a gradient is not finite, the update is skipped. `check_loss` later reports a nonfinite loss.

        Args:
            micro_batches: for every micro-batch (gradient accumulation), a list with one dict per device, which
                contains `img_data` (N, 3, H, W) and `seg_label` (N, h, w) on this device.
            weights: weights of the losses and accuracies of these batches.
        """
        options, size = self.options, self.world.size
        before = None
        if options.amp == "fp16":
            before = self.scaler.get_scale(), BufferSnapshot(self.module)
        self.optimizer.zero_grad(set_to_none=True)
        losses, means = [], self.metrics.totals.new_zeros(2)
        for i, batches in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with nullcontext() if last or size == 1 else self.model.no_sync():  # exchange gradients once per step
                with torch.autocast(self.device.type, AMP_DTYPES.get(options.amp), enabled=options.amp != "off"):
                    loss, accuracy = self.model(batches if len(batches) > 1 else batches[0])
                losses.append(loss.detach().reshape(-1))
                loss = weighted_sum(weights.loss[i], loss.float())
                # NaN if the loss is not finite; all gradients are then NaN, and the scaler skips the update.
                finite = 1 + 0 * loss.detach()
                # DistributedDataParallel averages gradients over the ranks; `size` turns the mean into a sum.
                self.scaler.scale(loss * finite * size).backward()
            means += torch.stack([loss.detach(), weighted_sum(weights.accuracy[i], accuracy)])
        if options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_((p for group in self.optimizer.param_groups for p in group["params"]), options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if size > 1:
            dist.all_reduce(means)
        if not (before and self._undo_overflow(*before)):
            self.metrics.add(self.step + 1, torch.cat(losses), means)
            if self.average:
                self.average.update()

    def _undo_overflow(self, scale: float, buffers: BufferSnapshot) -> bool:
        """If the scaler has skipped an fp16 update, restore the running statistics and return True; else return False.

        Args:
            scale, buffers: loss scale and buffers before the step.

        Raises:
            TrainingStopped: `MAX_OVERFLOWS` steps in a row were skipped.
        """
        if self.scaler.get_scale() >= scale:
            self.overflows_in_a_row = 0
            return False
        buffers.restore()
        self.overflows, self.overflows_in_a_row = self.overflows + 1, self.overflows_in_a_row + 1
        if self.overflows_in_a_row >= MAX_OVERFLOWS:
            raise TrainingStopped(
                f"step {self.step + 1}: {self.overflows_in_a_row} steps in a row overflowed in fp16 and were skipped; "
                f"{self.folder.describe_saved()}. Set TRAIN.amp bf16 or off, or a smaller learning rate"
            )
        return True

    def prepare_model(self) -> None:
        """Set the training mode, freeze the encoder in the first `freeze_encoder` steps, and set `model`."""
        frozen = self.step < self.options.freeze_encoder
        self.module.train()
        self.module.encoder.train(not frozen)
        for parameter in self.encoder_parameters:
            parameter.requires_grad_(not frozen)
        self.model = parallelize(self.module, self.world)

    def make_loader(self, dataset: TrainDataset) -> torch.utils.data.DataLoader:
        """Return a loader that yields the batches for this rank's devices, starting at the current step."""
        options, world, count = self.options, self.world, len(self.world.devices)
        rounds = range(self.step * options.accumulate, options.total_steps * options.accumulate)
        loader = make_loader(
            dataset,
            workers=options.workers,
            timeout=world.timeout,
            local_size=world.local_size,
            batch_size=None,
            sampler=(i * world.num_devices + count * world.rank + device for i in rounds for device in range(count)),
            pin_memory=self.device.type == "cuda",
        )
        logger.info("%d data loading workers", loader.num_workers)
        return loader

    def to_devices(self, batches: Sequence[dict]) -> list[dict]:
        """Copy one batch to each device and normalize the images there."""
        order = torch.channels_last if self.options.channels_last else torch.contiguous_format
        moved = []
        for batch, device in zip(batches, self.world.devices, strict=True):
            images, label = images_to_device(batch, device), batch["seg_label"].to(device, non_blocking=True)
            moved.append({"img_data": images.contiguous(memory_format=order), "seg_label": label})
        return moved

    def note_batches(self, micro_batches: Sequence[Sequence[dict]], weights: LossWeights) -> None:
        """Record image names, skipped images, labelled pixels and classes of a step for the next log line."""
        batches = list(chain.from_iterable(micro_batches))
        self.image_names[self.step + 1] = [batch.get("info", ()) for batch in batches]
        self.report_skipped(chain.from_iterable(batch.get("skipped", ()) for batch in batches))
        self.labelled_pixels += weights.labelled
        for label in (batch["seg_label"] for batch in batches if len(self.classes_seen) < 2):
            labelled = label[label >= 0]
            if labelled.numel():
                self.classes_seen |= {int(labelled.min()), int(labelled.max())}

    def watch(self) -> None:
        """With several ranks, print the stack trace unless `watch` is called again within 90 % of the timeout."""
        if self.world.size > 1:
            faulthandler.dump_traceback_later(0.9 * self.world.timeout, file=sys.__stderr__)

    def report_skipped(self, messages: Iterable[str]) -> None:
        """Log each message about an unusable image once, and store it for `finish`."""
        for message in messages:
            if message not in self.skipped:
                logger.warning("skipped: %s", message)
                self.skipped[message] = None

    def start(self, resume: str) -> None:
        """Prepare the folder and restore the checkpoint that is selected by `resume`, if any; see `fit`."""
        options, folder, state = self.options, self.folder, {}
        path = folder.find_resume(resume, options.start_epoch)
        if self.world.is_main:
            folder.folder.mkdir(parents=True, exist_ok=True)
            folder.remove_partial()
        if options.start_epoch:
            self.history = folder.load_epoch(self.module, options.start_epoch)
            self.best_iou = max(self.history["val"]["mean_iou"], default=self.best_iou)
            self.step = options.start_epoch * options.epoch_iters
            logger.info(
                "resuming after epoch %d with saved weights and history and a new optimizer", options.start_epoch
            )
        elif path:
            state = read_resume(path)
            restore_trainer(self, state)
            self.resumed_in_place = path.resolve() == folder.resume.resolve()
            folder.check_epoch_length(self.step, options.epoch_iters)
            logger.info("resuming %s at step %d of %d", path, self.step, options.total_steps)
        elif resume == "restart" and self.world.is_main:
            folder.remove_run()
        if reason := self.completed_by():
            logger.info("nothing to train in %s: %s", folder.folder, reason)
        if self.average:
            self.average.load_state(state.get("average"))
        starts = self.world.gather((str(folder.folder.absolute()), self.step), "comparing the first step")
        if len({step for _, step in starts}) > 1:
            found = "; ".join(f"rank {rank}: step {step} in {path}" for rank, (path, step) in enumerate(starts))
            raise CheckpointError(
                f"the ranks would start at different steps ({found}); set DIR to a folder that all ranks share"
            )

    def check_loss(self) -> None:
        """Wait for the device; raise `TrainingStopped` on all ranks if a loss since the last call was not finite."""
        step, losses = self.metrics.nonfinite()
        names = self.image_names.get(step, ())
        own = [(loss, batch) for loss, batch in zip(losses, names, strict=False) if not abs(loss) < float("inf")]
        self.image_names.clear()
        if step < 0:
            return
        found = list(chain.from_iterable(self.world.gather(own, "naming the batch")))
        loss = found[0][0] if found else float("inf")  # all losses are finite, but their sum is not
        images = ", ".join(name for _, batch in found for name in batch) or "(unknown)"
        epoch, iteration = divmod(step - 1, self.options.epoch_iters)
        raise TrainingStopped(
            f"step {step} (epoch {epoch + 1}, iteration {iteration + 1}): the loss is {loss} for the images {images}; "
            f"{self.folder.describe_saved()}. Nothing was saved after this step. Set a smaller learning "
            f"rate, or set TRAIN.warmup_iters or TRAIN.clip_grad"
        )

    def log(self) -> None:
        """Log the metrics since the last call and add them to the history."""
        self.check_loss()
        loss, accuracy, steps = self.metrics.read()
        if self.options.amp != "fp16" and self.scaler.is_enabled():
            self.overflows -= round(math.log2(self.scaler.get_scale()))
            self.scaler.update(1.0)
        if not steps:
            logger.info("step %d: all steps since the last log line overflowed in fp16 and were skipped", self.step)
            return
        if not self.labelled_pixels:
            logger.warning("step %d: no labelled pixel since the last log line, so the model learns nothing", self.step)
        if len(self.classes_seen) == 1 and not self.history["train"]["epoch"]:
            logger.warning(ONE_CLASS_WARNING.format(f"number {min(self.classes_seen)} so far"))
        epoch, iters = (self.step - 1) // self.options.epoch_iters, self.options.epoch_iters
        rates, (seconds, data_seconds) = learning_rates(self.optimizer), self.timer.means()
        logger.info(
            "epoch %d, step %d/%d, loss %.4f, acc %.2f %%, lr %s, %.2f s/step (%.2f s data), eta %s%s",
            epoch + 1,
            self.step - epoch * iters,
            iters,
            loss,
            accuracy * 100,
            "/".join(dict.fromkeys(f"{rate:.6f}" for rate in rates.values())),
            seconds,
            data_seconds,
            timedelta(seconds=round(seconds * (self.options.total_steps - self.step))),
            f", {self.overflows} steps skipped (nonfinite gradients)" if self.overflows else "",
        )
        for key, value in (("epoch", self.step / iters), ("loss", loss), ("acc", accuracy)):
            self.history["train"][key].append(value)
        self.metrics.totals.zero_()
        self.timer.reset()
        self.labelled_pixels = 0.0
        if self.run_logger:
            rates = {f"lr_{part}": rate for part, rate in rates.items()}
            self.run_logger.log_step(self.step, {"loss": loss, "accuracy": accuracy, **rates})

    def save(self) -> None:
        """Call `check_loss`, then save the checkpoint to resume from."""
        self.check_loss()
        if self.world.is_main:
            save_atomic(trainer_state(self), self.folder.resume)

    def end_epoch(self) -> None:
        """Save checkpoint, weights and history of an epoch, and validate every `eval_epoch` epochs.

        If the run is killed during this function, the resumed run calls this function again.
        """
        self.save()
        suffix = f"epoch_{self.epoch}.pth"  # its files exist if the run was stopped later in this function
        if not all(self.folder.path(part, suffix).is_file() for part in ("encoder", "decoder")):
            self._save_weights(suffix)
        evaluation, every = None, self.options.eval_epoch if self.val_dataset is not None else 0
        if every and self.epoch % every == 0 and self.epoch not in self.history["val"]["epoch"]:
            evaluation = self.validate()
            self.save()
        if self.world.is_main:
            save_atomic(self.history, self.folder.path("history", f"epoch_{self.epoch}.pth"))
        if self.run_logger:
            self.run_logger.log_epoch(self.step, self.history, evaluation)

    def validate(self) -> Evaluation:
        """Evaluate on the validation set, sharded over the ranks; extend the history and update the best weights.

        With `ema`, the averaged weights are evaluated.
        """
        with self.average.in_network() if self.average else nullcontext():
            broadcast_buffers(self.module, self.world)
            predictor = Predictor(self.module, self.device, self.inference)

        def on_result(item, prediction):
            self.watch()
            self.signals.raise_received()  # the checkpoint is already saved
            if self.run_logger and prediction is not None:
                self.run_logger.log_image(self.epoch, item, prediction)

        shard = evaluate(
            predictor,
            self.val_dataset.shard(self.world.rank, self.world.size),
            loss=partial(image_loss, predictor.network, downsampling=self.val_dataset.segm_downsampling_rate),
            loading=LoadOptions(1, self.options.workers, self.world.timeout, self.world.local_size),
            progress=self.world.is_main,
            on_result=on_result,
        )
        evaluation = Evaluation.merge(self.world.gather(shard, "validation"))
        self.report_skipped(evaluation.skipped)
        iou, accuracy = evaluation.summary.mean_iou, evaluation.summary.pixel_accuracy
        logger.info(
            "validation after epoch %d: loss %.4f, mean IoU %.4f (%.4f over the classes present), pixel accuracy "
            "%.2f %%%s",
            self.epoch,
            evaluation.loss,
            iou,
            evaluation.summary.mean_iou_present,
            accuracy * 100,
            f", {len(evaluation.skipped)} images skipped" if evaluation.skipped else "",
        )
        if evaluation.warning:
            logger.warning(evaluation.warning)
        points = {"epoch": self.epoch, "loss": evaluation.loss, "mean_iou": iou, "acc": accuracy}
        for key, value in points.items():
            self.history["val"][key].append(value)
        if iou > self.best_iou:
            self.best_iou = iou
            self._save_weights("best.pth")
        if self.step < self.options.total_steps and (reason := self.completed_by()):
            logger.info("training stops: %s", reason)
        return evaluation

    def _save_weights(self, suffix: str) -> None:
        """Save the weights on rank 0. With `ema`, save the averaged weights, and the others with the suffix `_raw`."""
        if not self.world.is_main:
            return
        if self.average:
            self.folder.save_weights(self.module, suffix.replace(".pth", "_raw.pth"))
        with self.average.in_network() if self.average else nullcontext():
            self.folder.save_weights(self.module, suffix)

    def stop(self) -> None:
        """Wait until rank 0 has saved, then raise `KeyboardInterrupt` on all ranks because one received a signal."""
        self.world.gather(None, "waiting for rank 0 to save")
        self.signals.raise_received()
        raise KeyboardInterrupt  # the signal was sent to another rank

    def finish(self) -> None:
        """Wait until rank 0 has saved its files, then log the images that any rank has skipped."""
        faulthandler.cancel_dump_traceback_later()
        for messages in self.world.gather(list(self.skipped), "waiting for rank 0 to save"):
            self.skipped |= dict.fromkeys(messages)
        if self.skipped:
            logger.warning(
                "%d unusable images or list entries skipped in this run:\n  %s",
                len(self.skipped),
                "\n  ".join(self.skipped),
            )
