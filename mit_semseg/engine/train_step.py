"""Parts of a training step: options, losses and their weights, metrics, random seeds, deterministic algorithms."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..lib.utils import UserError
from .distributed import World
from .losses import batch_weight

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Parts of PyTorch's error messages about operations without a deterministic implementation.
NONDETERMINISTIC = ("does not have a deterministic implementation", "Deterministic behavior was enabled")
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility


class NondeterministicError(UserError, RuntimeError):
    """An operation has no deterministic implementation on the device."""


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run, named as in the TRAIN section of the configuration.

    Attributes:
        run_options: options that are stored in checkpoints; a resumed run logs the options that have changed.
    """

    num_epoch: int = 20
    epoch_iters: int = 5000
    start_epoch: int = 0
    disp_iter: int = 20
    schedule: str = "poly"
    lr_pow: float = 0.9
    warmup_iters: int = 0
    freeze_encoder: int = 0
    ema: float = 0.0
    accumulate: int = 1
    clip_grad: float = 0.0
    amp: str = "off"
    channels_last: bool = False
    eval_epoch: int = 0
    patience: int = 0
    checkpoint_iters: int = 1000
    workers: int = 0
    seed: int = 304
    deterministic: bool = False
    run_options: Mapping[str, object] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Number of steps in the whole run."""
        return self.num_epoch * self.epoch_iters


class LossWeights:
    """Weights for the mean loss and the mean accuracy over the labelled pixels of a step, on all devices and ranks.

    The constructor is a collective, in which the ranks exchange pixel counts and whether they received a stop signal.

    Attributes:
        loss, accuracy: weights of this rank's batches, [micro-batch][device]; the sum over all ranks is 1.
        labelled: number of labelled pixels, summed over all ranks.
        stop: whether any rank has received a signal to stop.
    """

    def __init__(self, micro_batches: Sequence[Sequence[dict]], criterion: nn.Module | None, world: World, stop: bool):
        counts = torch.tensor(
            [
                [[float(batch_weight(x, batch["seg_label"])) for x in (criterion, None)] for batch in batches]
                for batches in micro_batches
            ],
            dtype=torch.float64,
        )  # (micro-batches, devices, 2)
        *sums, stops = world.sum([*counts.sum((0, 1)).tolist(), float(stop)], "counting labelled pixels")
        totals = torch.tensor(sums)
        weights = (counts / totals.where(totals > 0, 1)).tolist()
        self.loss = [[loss for loss, _ in row] for row in weights]
        self.accuracy = [[accuracy for _, accuracy in row] for row in weights]
        self.labelled, self.stop = sums[1], stops > 0


@torch.inference_mode()
def image_loss(network: nn.Module, scales: Sequence[Tensor], label: Tensor, downsampling: int) -> Tensor:
    """Return the training loss of a validation image times its weight, and its weight, as a tensor (2,).

    Args:
        network: `SegmentationModule` in evaluation mode.
        scales: normalized images (1, 3, h, w), one per scale. The loss is computed for the scale in the middle.
        label: (H, W) class indices.
        downsampling: downsampling rate of the labels in training.
    """
    image = scales[len(scales) // 2]
    rows, columns = (
        (2 * torch.arange(side // downsampling, device=label.device) + 1) * full // (2 * (side // downsampling))
        for side, full in zip(image.shape[-2:], label.shape, strict=True)
    )  # positions of the nearest labels
    label = label[rows[:, None], columns].unsqueeze(0)
    weight = batch_weight(network.crit, label).float()
    return torch.stack([network({"img_data": image, "seg_label": label})[0].float() * weight, weight])


class RunningMetrics:
    """Loss and pixel accuracy since the last log line, accumulated on the device.

    Only `read` and `nonfinite` synchronize with the device.

    Attributes:
        totals: tensor of 3 elements: sum of losses, sum of accuracies, and number of steps.
    """

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self._nonfinite_step = torch.full((), -1, device=device)
        self._nonfinite_losses: Tensor | None = None

    def add(self, step: int, losses: Tensor, means: Tensor) -> None:
        """Add a step. `losses` (B,) are of this rank's B batches; `means` (2,) are loss and accuracy over all ranks."""
        self.totals[:2] += means
        self.totals[2] += 1
        first = (self._nonfinite_step < 0) & ~means[0].isfinite()
        self._nonfinite_step = self._nonfinite_step.where(~first, step)
        if self._nonfinite_losses is None:
            self._nonfinite_losses = losses
        self._nonfinite_losses = torch.where(first, losses, self._nonfinite_losses)

    def read(self) -> tuple[float, float, int]:
        """Return the mean loss, the mean accuracy and the number of steps."""
        loss, accuracy, steps = self.totals.tolist()
        return loss / max(steps, 1), accuracy / max(steps, 1), round(steps)

    def nonfinite(self) -> tuple[int, list[float]]:
        """Return the number of the first step whose loss is not finite, or -1, and this rank's losses in that step."""
        step = int(self._nonfinite_step)
        return step, self._nonfinite_losses.tolist() if step >= 0 else []


class BufferSnapshot:
    """Copy of all buffers of a module in one tensor per dtype, because one copy per buffer would be slow on a GPU."""

    def __init__(self, module: nn.Module):
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._values = {dtype: torch.cat([x.flatten() for x in group]) for dtype, group in self._buffers.items()}

    def restore(self) -> None:
        for dtype, group in self._buffers.items():
            for buffer, values in zip(group, self._values[dtype].split([x.numel() for x in group]), strict=True):
                buffer.copy_(values.view_as(buffer))


class StepTimer:
    """Measures step durations since the last log line. Call `start` after saving and validation, which do not count."""

    def __init__(self):
        self.reset()
        self.start()

    def reset(self) -> None:
        self._steps, self._step_seconds, self._data_seconds = 0, 0.0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def data_loaded(self) -> None:
        self._data_seconds += time.perf_counter() - self._started

    def step_done(self) -> None:
        self._step_seconds += time.perf_counter() - self._started
        self._steps += 1

    def means(self) -> tuple[float, float]:
        """Return the mean duration of a step and the mean time that a step waited for data, in seconds."""
        return self._step_seconds / max(self._steps, 1), self._data_seconds / max(self._steps, 1)


def weighted_sum(weights: Sequence[float], values: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of `values`, one per device, without copying the weights to a device."""
    return sum(weight * value for weight, value in zip(weights, values.reshape(-1), strict=True))


def seed_step(seed: int, step: int, world: World) -> None:
    """Seed the random number generators for a step, so that dropout is the same in a resumed run.

    Every GPU gets its own seed. CPU replicas of one rank share a generator, so their dropout depends on thread timing.
    """
    first = len(world.devices) * world.rank
    for position, device in enumerate(world.devices, first):
        value = int(np.random.SeedSequence((seed, 2, step, position)).generate_state(1, np.uint64)[0])
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(value)
        elif position == first:
            torch.manual_seed(value)


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Context that sets `torch.backends.cudnn.benchmark` to True if `enabled`."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Context in which repeated operations have bit-identical results on the same hardware.

    Raises:
        NondeterministicError: an operation has no deterministic implementation on the device.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, UserError) or not any(text in str(error) for text in NONDETERMINISTIC):
            raise
        raise NondeterministicError(
            f"TRAIN.deterministic: {str(error).split(', but you set')[0].splitlines()[0]}; set TRAIN.deterministic "
            f"False, or train with --gpus cpu"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
