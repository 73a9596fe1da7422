"""Batch normalization whose statistics are taken over all replicas of a process and all processes of a group.

The classes are ordinary `torch.nn.BatchNorm*d` modules: same parameters, buffers and state-dict keys. On one device
they are PyTorch's own kernel, otherwise `normalize.py`.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .replicas import ReplicaGroup
from .sync_stats import Normalize, SyncStatistics, channel_shape, world_size

_thread = threading.local()


def recomputing() -> bool:
    """Whether this thread repeats a forward pass under activation checkpointing: the running statistics have already
    been updated by the first pass."""
    return getattr(_thread, "recomputing", False)


@contextmanager
def recomputation() -> Iterator[None]:
    """Context for the repeated forward pass of activation checkpointing; see `recomputing`."""
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = False


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three classes share.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as of `nn.BatchNorm2d`.
        clamp_variance: where statistics are shared, divide by sqrt(max(var, eps)), as the published models were
            trained, and not by PyTorch's sqrt(var + eps).
        synchronized: False takes the statistics of every replica and process by itself; the running estimates are then
            the first one's.

    Attributes:
        process_group: processes to synchronize with; None means all of them, where `torch.distributed` is in use.
    """

    clamp_variance = True
    synchronized = True
    process_group: dist.ProcessGroup | None = None
    _name = ""
    _replicas: ReplicaGroup | None = None  # set on replicas only
    _rank = 0

    def __init__(self, *args, clamp_variance: bool = True, synchronized: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.clamp_variance, self.synchronized = clamp_variance, synchronized

    def forward(self, x: Tensor) -> Tensor:
        """Normalize per channel.

        Args:
            x: (N, C, ...) of any floating type.

        Returns:
            A tensor of the shape and type of `x`.

        Raises:
            ReplicaError, ProcessGroupError: another replica or process failed or did not arrive in time.
        """
        if isinstance(x, torch.fx.Proxy) and not self.training:  # traced by FX: sizes are symbolic
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        self._check_channels(x)
        if self._meets_replicas():
            given = x, self.weight, self.bias
            return self._replicas.together(self._rank, self._called(), given, self._normalize_together)
        if self._meets_processes():
            return self._normalize_together([(x, self.weight, self.bias)])[0]
        if self._is_single_value(x):
            return self._single_value(x)
        if self.training and self.track_running_stats and not self._learns:
            # The running estimates are given, as where they are learnt: recomputing wants the same tensors kept.
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)

    def _check_channels(self, x: Tensor) -> None:
        self._check_input_dim(x)
        if x.size(1) != self.num_features:
            raise ValueError(f"{self._called()} takes {self.num_features} channels, not {tuple(x.shape)}")

    def _meets_replicas(self) -> bool:
        return self.training and self.synchronized and self._replicas is not None and self._replicas.size > 1

    def _meets_processes(self) -> bool:
        return self.training and self.synchronized and world_size(self.process_group) > 1

    def _is_single_value(self, x: Tensor) -> bool:
        return self.training and self.track_running_stats and x.numel() == x.size(1)

    @property
    def _learns(self) -> bool:
        """Whether the running estimates are this replica's to learn, and this is the first pass."""
        return not self._rank and not recomputing()

    def join(self, replicas: ReplicaGroup | None, rank: int = 0, name: str = "") -> None:
        """Take part in a group of replicas from the next forward pass on.

        Args:
            replicas: the group; None leaves it.
            rank: of this replica.
            name: what errors call this layer.
        """
        self._replicas, self._rank, self._name = replicas, rank, name

    def __deepcopy__(self, memo: dict) -> "SynchronizedBatchNorm":
        """A copy with the same process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = made = self.__class__.__new__(self.__class__)
        made.__setstate__(copy.deepcopy(vars(self), memo))
        return made

    def to_plain(self) -> None:
        """Become an `nn.BatchNorm*` with the same parameters and buffers."""
        self.__class__ = next(kind for kind, own in _PLAIN.items() if isinstance(self, own))
        for name in ("clamp_variance", "synchronized", "process_group", "_replicas", "_rank", "_name"):
            vars(self).pop(name, None)

    def _called(self) -> str:
        return self._name or f"{type(self).__name__}({self.num_features})"

    def _normalize_together(self, given: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> Sequence[Tensor]:
        """Outputs of all replicas of this process from their (input, weight, bias); learns the running estimates."""
        inputs, weights, biases = zip(*given, strict=True)
        meeting = SyncStatistics(self.eps, self.clamp_variance, self.process_group, self._called())
        outputs = Normalize.apply(meeting, *inputs, *(weights + biases if self.affine else ()))
        if self.track_running_stats and not recomputing():
            with torch.no_grad():
                self._update_running(meeting.mean, meeting.squares / (meeting.count - 1).clamp(min=1))
        return outputs

    def _single_value(self, x: Tensor) -> Tensor:
        # One value per channel has no variance (a 1x1 pooled map of a batch of one): a batch estimate would erase the
        # input. Learn the running estimates from the deviation to the running mean and normalize with those.
        if self._learns:
            with torch.no_grad():
                value = x.detach().flatten().to(self.running_mean.dtype)
                self._update_running(value, (value - self.running_mean).square())
        shape = channel_shape(x)
        y = (x - self.running_mean.view(shape)) * torch.rsqrt(self.running_var + self.eps).view(shape)
        if self.affine:
            y = y * self._scale().view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _scale(self) -> Tensor:
        return self.weight

    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), momentum)


class SynchronizedBatchNorm1d(SynchronizedBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics over all replicas and processes; input (N, C) or (N, C, L)."""


class SynchronizedBatchNorm2d(SynchronizedBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics over all replicas and processes; input (N, C, H, W).

    Unlike `nn.BatchNorm2d` it also trains on a single value per channel (a 1x1 map of one image): see `_single_value`.
    """


class SynchronizedBatchNorm3d(SynchronizedBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics over all replicas and processes; input (N, C, D, H, W)."""


_PLAIN = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    nn.BatchNorm3d: SynchronizedBatchNorm3d,
}


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make every batch norm in a module a synchronized one: `nn.BatchNorm1d/2d/3d`, and ours with `synchronized` False.

    The layers are converted in place: parameters, buffers, hooks, and what was frozen stay as they are, and so does
    the divisor sqrt(var + eps).

    Args:
        module: any module, also a batch norm itself.
        process_group: processes to synchronize with, None for all.

    Returns:
        `module`.
    """
    for part in module.modules():
        if type(part) in _PLAIN:
            part.__class__ = _PLAIN[type(part)]
            part.process_group, part.clamp_variance = process_group, False
        elif isinstance(part, SynchronizedBatchNorm):
            part.process_group, part.synchronized = process_group, True
    return module


def to_batchnorm(module: nn.Module) -> nn.Module:
    """Make every synchronized batch norm in a module a plain `nn.BatchNorm*`, e.g. for export; the opposite of
    `convert_sync_batchnorm`, in place as well.

    Returns:
        `module`.

    Raises:
        ValueError: an in-place norm has an activation in it.
    """
    for part in module.modules():
        if isinstance(part, SynchronizedBatchNorm):
            part.to_plain()
    return module
