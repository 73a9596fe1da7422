"""Batch normalization with statistics over all replicas and ranks.

The layers are subclasses of `torch.nn.BatchNorm*d` with the same parameters, buffers and state-dict keys. On a single
device they call PyTorch's kernel; on several devices they call `sync_stats.SyncBatchNormFunction`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .replicas import ReplicaGroup
from .sync_stats import RunningStats, SyncBatchNormFunction, SyncStatistics, statistics_class

MIN_IMAGES = 16  # with fewer images per step, norms after global pooling use running statistics
# Attributes that `nn.BatchNorm*d` does not have
EXTRA_ATTRIBUTES = "after_global_pooling", "clamp_variance", "synchronized", "layer_name", "replicas", "replica_index"
_thread_state = threading.local()


@contextmanager
def recomputation() -> Iterator[None]:
    """Prevent a second update of running statistics while activation checkpointing recomputes a forward pass."""
    _thread_state.recomputing = True
    try:
        yield
    finally:
        _thread_state.recomputing = False


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base class of `SynchronizedBatchNorm1d`, `2d` and `3d`.

    Args:
        args, kwargs: see `nn.BatchNorm2d`.
        clamp_variance: in synchronized training, divide by sqrt(max(var, eps)), as for the published models; False
            divides by sqrt(var + eps), like PyTorch.
        synchronized: False computes statistics per replica and rank; replica 0 updates the running statistics.

    Attributes:
        after_global_pooling: whether the input has one value per image and channel. The statistics of a few images are
            too noisy to learn from, so a training step with fewer than `MIN_IMAGES` images on all devices first updates
            the running statistics, and then normalizes by them.
    """

    after_global_pooling = False
    clamp_variance = True
    synchronized = True
    # `DataParallelWithCallback` sets the next three attributes in every replica.
    layer_name = ""  # used in error messages
    replicas: ReplicaGroup | None = None
    replica_index = 0

    def __init__(self, *args, clamp_variance: bool = True, synchronized: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.clamp_variance, self.synchronized = clamp_variance, synchronized

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of (N, C, ...); raise ReplicaError or ProcessGroupError if a replica or rank fails."""
        if isinstance(x, torch.fx.Proxy):  # in FX tracing, sizes are symbolic
            stats, momentum = (self.running_mean, self.running_var), self.momentum or 0.0
            return F.batch_norm(x, *stats, self.weight, self.bias, self.training, momentum, self.eps)
        self._check_input_dim(x)
        if self._syncs_replicas():
            return self._gather_and_normalize(x, self.weight, self.bias)
        if self._syncs_ranks():
            return self._normalize_replicas([(x, self.weight, self.bias)])[0]
        if self._needs_running_stats([x]):
            return self._normalize_by_running_stats([(x, self.weight, self.bias)])[0]
        if self.training and self.track_running_stats and not self._updates_running_stats():
            # Recomputation must save the same tensors: pass the running statistics, with momentum 0 to keep them.
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)

    def to_plain(self) -> None:
        """Convert this layer in place to `nn.BatchNorm*d` with the same parameters and buffers."""
        self.__class__ = next(plain for plain, kind in reversed(SYNCHRONIZED.items()) if isinstance(self, kind))
        for name in EXTRA_ATTRIBUTES:
            vars(self).pop(name, None)

    def _display_name(self) -> str:
        return self.layer_name or f"{type(self).__name__}({self.num_features})"

    def _syncs_replicas(self) -> bool:
        return self.training and self.synchronized and self.replicas is not None

    def _syncs_ranks(self) -> bool:
        distributed = dist.is_available() and dist.is_initialized()
        return self.training and self.synchronized and distributed and dist.get_world_size() > 1

    def _updates_running_stats(self) -> bool:
        recomputing = getattr(_thread_state, "recomputing", False)
        return self.track_running_stats and self.replica_index == 0 and not recomputing

    def _gather_and_normalize(self, *arguments: Tensor | None) -> Tensor:
        name = self._display_name()
        return self.replicas.gather_and_compute(self.replica_index, name, arguments, self._normalize_replicas)

    def _normalize_replicas(self, arguments: list[tuple[Tensor | None, ...]]) -> Sequence[Tensor]:
        """Return the output of each replica; `arguments` holds (input, weight, bias) of each replica."""
        inputs, weights, biases = zip(*arguments, strict=True)
        if self._needs_running_stats(inputs):
            return self._normalize_by_running_stats(arguments)
        stats = statistics_class(inputs[0])(self.eps, self.clamp_variance, self._display_name())
        return SyncBatchNormFunction.apply(stats, self._running_stats(), *inputs, *weights, *biases)

    def _needs_running_stats(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the inputs of all replicas have too few values per channel for statistics."""
        if not (self.training and self.track_running_stats):
            return False
        ranks = dist.get_world_size() if self._syncs_ranks() else 1
        images, values = ranks * sum(map(len, inputs)), ranks * sum(x.numel() // x.size(1) for x in inputs)
        return values == 1 or (self.after_global_pooling and images < MIN_IMAGES)

    def _normalize_by_running_stats(self, arguments: Sequence[tuple[Tensor | None, ...]]) -> list[Tensor]:
        """Update the running statistics and normalize by them; see `_normalize_replicas`."""
        inputs = [x.detach() for x, *_ in arguments]
        if running := self._running_stats():
            values = inputs[0].flatten(1).to(self.running_mean.dtype)
            if len(inputs) == 1 and values.numel() == self.num_features and not self._syncs_ranks():
                # A single value has no variance: use its squared deviation from the running mean.
                running.update(values[0], (values[0] - self.running_mean).square())
            else:
                stats = SyncStatistics(self.eps, layer_name=self._display_name(), local=not self.synchronized)
                stats.merge(inputs, running)
        # Copies, because the next forward pass can change the running statistics before the backward pass.
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        return [
            F.batch_norm(x, mean.to(x.device), variance.to(x.device), weight, bias, False, 0.0, self.eps)
            for x, weight, bias in arguments
        ]

    def _running_stats(self) -> RunningStats | None:
        """Count this batch; return the running statistics that it updates, or None."""
        if not self._updates_running_stats():
            return None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return RunningStats(self.running_mean, self.running_var, momentum)


class SynchronizedBatchNorm1d(SynchronizedBatchNorm, nn.BatchNorm1d):
    """Synchronized `nn.BatchNorm1d`; input (N, C) or (N, C, L)."""


class SynchronizedBatchNorm2d(SynchronizedBatchNorm, nn.BatchNorm2d):
    """Synchronized `nn.BatchNorm2d`; input (N, C, H, W). A single value per channel is allowed in training."""


class SynchronizedBatchNorm3d(SynchronizedBatchNorm, nn.BatchNorm3d):
    """Synchronized `nn.BatchNorm3d`; input (N, C, D, H, W)."""


# Classes that `convert_sync_batchnorm` converts -> synchronized classes; a subclass follows its base class
SYNCHRONIZED = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    nn.BatchNorm3d: SynchronizedBatchNorm3d,
}


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Convert all batch norms of a module in place to synchronized ones, and return the module.

    Parameters, buffers and hooks are kept. The converted layers still divide by sqrt(var + eps).
    """
    for part in module.modules():
        if type(part) in SYNCHRONIZED:
            part.__class__ = SYNCHRONIZED[type(part)]
            part.clamp_variance = False
        elif isinstance(part, SynchronizedBatchNorm):
            part.synchronized = True
    return module


def to_batchnorm(module: nn.Module) -> nn.Module:
    """Convert all synchronized batch norms of a module in place to `nn.BatchNorm*d`, and return the module.

    Raises ValueError if the module contains an `InPlaceABN`.
    """
    for part in module.modules():
        if isinstance(part, SynchronizedBatchNorm):
            part.to_plain()
    return module
