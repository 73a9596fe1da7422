"""State of a training run: what is saved to continue it, bit for bit."""

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..evaluation import AverageMeter
from ..lib.nn.inplace_abn import has_inplace_norms
from ..lib.utils import UserError
from .checkpoint import CheckpointError, new_history
from .distributed import TIMEOUT

logger = logging.getLogger(__name__)


AGAINST_DIVERGENCE = "A smaller learning rate, TRAIN.warmup_iters or TRAIN.clip_grad usually help"


class TrainingStopped(UserError, RuntimeError):
    """A run that could not go on; the message names step, files and what can be continued from."""


@dataclass(frozen=True)
class Settings:
    """What a run needs to know beside model, optimizer and data; meanings as of the TRAIN options.

    Attributes:
        options: plain values that are kept with the run's state; those that are others when it goes on are said.
    """

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
    timeout: float = TIMEOUT
    seed: int = 304
    deterministic: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.num_epoch * self.epoch_iters


class Run:
    """Everything of a training run that changes from step to step, and how it is saved and restored.

    Args:
        module: a `SegmentationModule` on `device`.
        optimizer: over its parameters.
        device: where both are.
        settings: of the run; with `amp` fp16 the loss is scaled so that gradients do not underflow.
        batches: per step, over all devices, processes and accumulated steps.
        job: see `Place.job`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        settings: Settings,
        *,
        batches: int = 1,
        job: str = "",
    ):
        self.module, self.optimizer, self.device, self.batches, self.job = module, optimizer, device, batches, job
        self.options = dict(settings.options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.step, self.best, self.history = 0, -1.0, new_history()
        self.loss, self.accuracy = AverageMeter(), AverageMeter()
        self.pending: list = []  # `StepFigures` that nobody has waited for yet
        self.skipped_steps, self.skipped_in_a_row = 0, 0  # steps that were too large for float16
        self.labelled = 0.0  # pixels since the last line of the log
        self.classes: set[int] = set()  # seen in labels, until there are two
        self.skipped: dict[str, None] = {}  # sentences about what could not be used, each once

    def state(self) -> dict:
        """Plain values and tensors from which the run continues bit for bit (random numbers are a function of seed and
        step, see `seed_step`)."""
        assert not self.pending, "no state is saved whose loss may be NaN"
        return {
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "meters": [(m.sum, m.count) if m.initialized else None for m in (self.loss, self.accuracy)],
            "encoder": self.module.encoder.state_dict(),
            "decoder": self.module.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
            "batches": self.batches,
            "norm": self._norm(),
            "job": self.job,
            "options": self.options,
            "skipped": list(self.skipped),
            "skipped_steps": (self.skipped_steps, self.skipped_in_a_row),
        }

    def not_finite(self) -> str:
        """Name of a weight, or running statistic, that is infinite or no number; '' for none."""
        values = [(name, value) for name, value in self.module.state_dict().items() if value.is_floating_point()]
        finite = torch.stack([value.isfinite().all() for _, value in values])
        return "" if finite.all() else values[int(finite.int().argmin())][0]

    def note_classes(self, labels: torch.Tensor) -> None:
        """Record which classes occur in labels (N, H, W), -1 where ignored."""
        labelled = labels[labels >= 0] if len(self.classes) < 2 else labels[:0]
        if labelled.numel():
            self.classes |= {int(labelled.min()), int(labelled.max())}

    def leave_out(self, sentences: Iterable[str]) -> None:
        """Note what could not be used (DATASET.on_error skip), and say it the first time."""
        for sentence in sentences:
            if sentence not in self.skipped:
                logger.warning("left out: %s", sentence)
                self.skipped[sentence] = None

    def _norm(self) -> str:
        return "inplace" if has_inplace_norms(self.module.state_dict()) else "plain"

    def restore(self, state: dict) -> None:
        """Continue from a `state`.

        Learning rates, momentum and weight decay stay those of this run's options; what the optimizer has gathered
        (momentum buffers) is taken over.

        Raises:
            CheckpointError: the state is of another model or optimizer.
        """
        norm = state.get("norm", "plain")
        if norm != self._norm():
            raise CheckpointError(
                f"the saved run has {norm} norms, this one {self._norm()}: use its MODEL.norm, or TRAIN.resume restart"
            )
        try:
            self.module.encoder.load_state_dict(state["encoder"])
            self.module.decoder.load_state_dict(state["decoder"])
        except RuntimeError:
            raise CheckpointError(
                f"the saved run is of another model (saved: {_named(state.get('options', {}))}; now: "
                f"{_named(self.options)}): use its MODEL and DATASET.num_class options, or TRAIN.resume restart"
            ) from None
        own, saved = self.optimizer.state_dict(), state["optimizer"]
        sizes = [[len(group["params"]) for group in groups["param_groups"]] for groups in (own, saved)]
        if sizes[0] != sizes[1] or state["optimizer_name"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"the saved run is of another optimizer (saved: {state['optimizer_name']} of {sum(sizes[1])} tensors; "
                f"now: {type(self.optimizer).__name__} of {sum(sizes[0])}): use its TRAIN.optim and TRAIN.fix_bn, or "
                f"TRAIN.resume restart"
            )
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
        _lay_out_like_parameters(self.optimizer)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        self.skipped = dict.fromkeys(state.get("skipped", ()))
        self.skipped_steps, self.skipped_in_a_row = state.get("skipped_steps", (0, 0))
        for meter, saved in zip((self.loss, self.accuracy), state["meters"], strict=True):
            if saved:
                meter.initialize(saved[0] / saved[1], saved[1])
                meter.sum = saved[0]
        if state.get("batches", self.batches) != self.batches:
            logger.warning(
                "the run was saved with %d batches per step (devices times TRAIN.accumulate), and goes on with %d: "
                "learning rates may need to follow",
                state["batches"],
                self.batches,
            )
        saved = state.get("options", {})
        other = [key for key, value in self.options.items() if saved.get(key, value) != value]
        if other:
            changes = [f"{key} {reprlib.repr(self.options[key])} (was {reprlib.repr(saved[key])})" for key in other]
            logger.info("going on with other options than before: %s", ", ".join(changes))


def _named(options: Mapping[str, object]) -> str:
    """Describe the model of saved options, e.g. `mobilenetv2dilated + c1_deepsup, 11 classes`."""
    if "MODEL.arch_encoder" not in options:
        return "unknown"
    stride = options.get("MODEL.output_stride")
    name = f"{options['MODEL.arch_encoder']} + {options['MODEL.arch_decoder']}, {options['DATASET.num_class']} classes"
    return f"{name}, output stride {stride}" if stride else name


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give every tensor of an optimizer's state the memory format of its parameter: fused kernels read both as if they
    were laid out alike, and a saved state has the format of its own run (TRAIN.channels_last)."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def seed_step(seed: int, step: int, devices: Sequence[torch.device], first: int = 0) -> None:
    """Seed the random numbers of a step (dropout), so that a run can be continued anywhere.

    Args:
        seed: of the run.
        step: number of the step.
        devices: of this process; each has numbers of its own. CPU replicas draw from one stream, in the order in which
            they come to it.
        first: position of the first device among those of all processes.
    """
    for position, device in enumerate(devices, first):
        value = int(np.random.SeedSequence((seed, 2, step, position)).generate_state(1, np.uint64)[0])
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(value)
        elif position == first:
            torch.manual_seed(value)
