"""Batch normalization whose statistics are taken over all replicas of a `DataParallel`.

The classes are ordinary `torch.nn.BatchNorm*d` modules: same parameters, buffers and state-dict keys. On one device
they are PyTorch's own kernel. Inside a replicated module (see `parallel.py`) every replica contributes its count, mean
and sum of squared deviations, which are merged as in Chan, Golub & LeVeque (1979): the variance is never negative.
"""

import threading

import torch
from torch import Tensor, nn


class BatchNormGroup:
    """Meeting point of the replicas of one normalization layer.

    Args:
        size: number of replicas that take part in every forward pass.
        timeout: seconds a replica waits for the others before it raises.
        name: what to call the layer in error messages.
    """

    def __init__(self, size: int, timeout: float = 120.0, name: str = "batch norm"):
        self.size, self.timeout, self.name = size, timeout, name
        self._barrier = threading.Barrier(size, timeout=timeout)
        self._slots: list = [None] * size

    def exchange(self, rank: int, value) -> list:
        """Hand in this replica's value; returns the values of all replicas, in the order of their ranks.

        Raises:
            RuntimeError: a replica failed or did not arrive in time.
        """
        self._slots[rank] = value
        try:
            self._barrier.wait()
            values = list(self._slots)
            self._barrier.wait()  # nobody starts the next exchange before everybody has read this one
        except threading.BrokenBarrierError:
            raise RuntimeError(
                f"{self.name}: a replica failed or did not arrive within {self.timeout:g} s (replica {rank} of "
                f"{self.size} was waiting); look for the first error above this one"
            ) from None
        return values


class _SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three classes share; `_group` and `_rank` are set on replicas only."""

    _group: BatchNormGroup | None = None
    _rank = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize per channel.

        Args:
            x: (N, C, ...) of any floating type.

        Returns:
            A tensor of the shape and type of `x`.
        """
        self._check_input_dim(x)
        if self.training and self._group is not None and self._group.size > 1:
            return self._synchronized(x)
        if self.training and self.track_running_stats and x.numel() == x.size(1):
            return self._single_value(x)
        return super().forward(x)

    def join(self, group: BatchNormGroup | None, rank: int) -> None:
        """Take part in `group` as replica `rank` from the next forward pass on; None leaves it."""
        self._group, self._rank = group, rank

    def _single_value(self, x: Tensor) -> Tensor:
        # One value per channel has no variance (a 1x1 pooled map of a batch of one): a batch estimate would erase the
        # input. Learn the running estimates from the deviation to the running mean and normalize with those.
        with torch.no_grad():
            value = x.detach().flatten().to(self.running_mean.dtype)
            self._update_running(value, (value - self.running_mean).square())
        dims = (1, -1) + (1,) * (x.dim() - 2)
        y = (x - self.running_mean.view(dims)) * torch.rsqrt(self.running_var + self.eps).view(dims)
        return self._affine(y, dims).to(x.dtype)

    def _synchronized(self, x: Tensor) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(kind)
        axes = [0, *range(2, x.dim())]
        count = x.numel() // x.size(1)
        mean = wide.mean(axes)
        squares = (wide - mean.view(1, -1, *[1] * (x.dim() - 2))).square().sum(axes)
        parts = self._group.exchange(self._rank, (count, mean, squares))
        total = sum(part[0] for part in parts)
        means = [part[1].to(x.device) for part in parts]
        whole = sum(part[0] / total * part_mean for part, part_mean in zip(parts, means, strict=True))
        squares = sum(
            part[2].to(x.device) + part[0] * (part_mean - whole).square()
            for part, part_mean in zip(parts, means, strict=True)
        )
        if self.track_running_stats and self._rank == 0:  # replicas of rank 0 share the buffers of the original
            with torch.no_grad():
                self._update_running(whole, squares / max(total - 1, 1))
        dims = (1, -1) + (1,) * (x.dim() - 2)
        y = (wide - whole.view(dims)) * torch.rsqrt((squares / total).clamp(min=self.eps)).view(dims)
        return self._affine(y, dims).to(x.dtype)

    def _affine(self, y: Tensor, dims: tuple[int, ...]) -> Tensor:
        return y * self.weight.view(dims) + self.bias.view(dims) if self.affine else y

    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), momentum)


class SynchronizedBatchNorm1d(_SynchronizedBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics over all replicas; input (N, C) or (N, C, L)."""


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics over all replicas; input (N, C, H, W).

    Unlike `nn.BatchNorm2d` it also trains on a single value per channel (a 1x1 map of one image): see `_single_value`.
    """


class SynchronizedBatchNorm3d(_SynchronizedBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics over all replicas; input (N, C, D, H, W)."""
