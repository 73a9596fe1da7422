"""One step of training, over the batches of all devices and processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..dataset.datasets import images_to_device
from ..lib.nn import UserScatteredDataParallel
from ..lib.nn.scatter import copy_to_device
from ..lib.utils import UserError
from .distributed import Processes, gradient_exchange
from .losses import weight_of
from .run import Settings

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(UserError, RuntimeError):
    """The loss became infinite or NaN; holds what the message of the run needs.

    Attributes:
        steps: that came after, before anybody looked at the figures.
    """

    def __init__(self, loss: float, files: Sequence[str], steps: int = 0):
        super().__init__(f"the loss is {loss} for the batch {', '.join(files) or '(files unknown)'}")
        self.steps = steps


@dataclass(frozen=True)
class StepFigures:
    """What a step leaves behind on its device. Reading it waits for the device, see `settle`.

    Attributes:
        shares: (2,) of this process in loss and pixel accuracy over all labelled pixels.
        losses: (B,) of every batch.
        files: of every batch.
        skipped: the step changed nothing: its values were too large for float16.
        labelled: pixels, in all processes.
        ending: a process has been asked to end the run after this step.
    """

    shares: Tensor
    losses: Tensor
    files: Sequence[Sequence[str]]
    skipped: bool = False
    labelled: float = 0.0
    ending: bool = False


class _Statistics:
    """Running statistics, kept as they were where a step in float16 turns out too large.

    `GradScaler` leaves the weights alone then, but the forward pass has already changed these.

    Args:
        runner: whose buffers they are.
        optimizer: of the run.
        scaler: of the run; where it scales nothing, nothing is kept.
    """

    def __init__(self, runner: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self._scaler, self._active, self._optimizer = scaler, scaler.is_enabled(), optimizer
        self._fresh = not any(optimizer.state.values())
        self._buffers = list(runner.buffers()) if self._active else []
        self._before, self._scale = [buffer.clone() for buffer in self._buffers], scaler.get_scale()

    def checked(self, loss: Tensor) -> Tensor:
        """The loss, NaN where the statistics are not finite: so the step is skipped in all processes."""
        floats = [buffer.flatten().float() for buffer in self._buffers if buffer.is_floating_point()]
        return loss + torch.cat(floats).mul(0).sum() if floats else loss

    def settled(self) -> bool:
        """To be called after the step; whether it was skipped. Everything is then as it was before."""
        skipped = self._active and self._scaler.get_scale() < self._scale
        if skipped:
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
            if self._fresh:  # fused SGD that skips its first step leaves momenta of whatever was in the memory
                self._optimizer.state.clear()
        return skipped


def train_step(
    runner: UserScatteredDataParallel,
    chunks: Sequence[Sequence[dict]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    devices: Sequence[torch.device],
    processes: Processes,
    settings: Settings,
    loss: nn.Module | None = None,
    ending: bool = False,
) -> StepFigures:
    """One update from several batches, in which every labelled pixel of all devices and processes counts the same, or
    as much as the loss says (see `losses.weight_of`). Waits for the device in float16 only, as `GradScaler` does. A
    step that is too large for float16 changes nothing.

    Args:
        runner: see `distributed.parallel`; returns losses averaged over labelled pixels, and accuracies.
        chunks: batches worked on one after the other, gradients added up; each holds one batch per device.
        devices: of this process.
        settings: of the run; its amp, channels_last and clip_grad are used.
        loss: the runner's.
        ending: whether this process has been asked to end the run; all of them get to know it.

    Raises:
        ProcessGroupError: another process ended or did not answer in time.
    """
    optimizer.zero_grad(set_to_none=True)
    statistics = _Statistics(runner, optimizer, scaler)
    counts = torch.tensor(
        [[[float(weight_of(x, batch["seg_label"])) for x in (loss, None)] for batch in chunk] for chunk in chunks],
        dtype=torch.float64,
    )  # of the loss, and of the accuracy: (chunks, devices, 2)
    *sums, asked = processes.sum([*counts.sum((0, 1)).tolist(), float(ending)], "counting labelled pixels")
    totals = torch.tensor(sums)
    shares, losses_seen = [], []
    for number, (chunk, parts) in enumerate(zip(chunks, counts / totals.where(totals > 0, 1), strict=True)):
        weights, parts = parts.float().to(devices[0]).unbind(1)
        feeds = [_feed(batch, device, settings.channels_last) for batch, device in zip(chunk, devices, strict=False)]
        with processes.waiting("forward and backward pass"), gradient_exchange(runner, number == len(chunks) - 1):
            with torch.autocast(devices[0].type, dtype=AMP_TYPES.get(settings.amp), enabled=settings.amp != "off"):
                losses, accuracies = (values.reshape(-1) for values in runner(feeds))
            share = (losses.float() * weights).sum()
            # Gradients are averaged over the processes, while the shares are to be added up.
            scaler.scale(statistics.checked(share) * processes.size).backward()
        shares.append(torch.stack([share.detach(), (accuracies * parts).sum()]))
        losses_seen.append(losses.detach())
    if settings.clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), settings.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    files = [batch.get("info", []) for chunk in chunks for batch in chunk]
    known = {"skipped": statistics.settled(), "labelled": sums[1], "ending": asked > 0}
    return StepFigures(torch.stack(shares).sum(0), torch.cat(losses_seen), files, **known)


def settle(steps: Sequence[StepFigures], processes: Processes) -> list[tuple[float, float]]:
    """Loss and pixel accuracy of steps, over all labelled pixels of all processes, which settle the same steps. Those
    that were skipped have none.

    Raises:
        NonFiniteLoss: in all processes, of the first step whose loss is not finite.
    """
    own = torch.stack([step.shares for step in steps]).cpu().double()
    values = torch.tensor(processes.sum(own.flatten().tolist(), "adding up losses")).view(-1, 2).tolist()
    for number, (loss, _) in enumerate(values):
        if not math.isfinite(loss) and not steps[number].skipped:
            raise _non_finite(steps[number], len(steps) - 1 - number, processes)
    return [tuple(pair) for pair, step in zip(values, steps, strict=True) if not step.skipped]


def _feed(batch: dict, device: torch.device, channels_last: bool) -> dict:
    order = torch.channels_last if channels_last else torch.contiguous_format
    pictures = images_to_device(batch, device).contiguous(memory_format=order)
    return {"img_data": pictures, "seg_label": copy_to_device(batch["seg_label"], device)}


def _non_finite(step: StepFigures, later: int, processes: Processes) -> NonFiniteLoss:
    """The error, the same in all processes, with the files of the batches whose loss it is."""
    own = [pair for pair in zip(step.losses.tolist(), step.files, strict=True) if not math.isfinite(pair[0])]
    everywhere = [entry for entries in processes.collect(own, "naming the batch") for entry in entries]
    loss = everywhere[0][0] if everywhere else math.inf  # every share was finite, their sum was not
    return NonFiniteLoss(loss, [name for _, files in everywhere for name in files], later)
