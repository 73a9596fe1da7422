"""Statistics and autograd function of synchronized batch normalization.

Counts, means and variances of replicas and ranks are merged as in Chan, Golub & LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979, so the variance is never negative. The forward pass and the
backward pass each use one collective. All replicas of a process share one autograd node.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils import UserError, cache_tensors, first_sentence

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.14
TINY = 1e-30  # epsilon that changes no float32 variance, but prevents a division by zero in CUDA kernels


class ProcessGroupError(UserError, RuntimeError):
    """Communication failed because another rank ended or timed out."""


class RunningStats(NamedTuple):
    """Running mean and running variance (C,) of a layer, and the momentum of the next update."""

    mean: Tensor
    variance: Tensor
    momentum: float

    def update(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        self.mean.lerp_(mean.to(self.mean), self.momentum)
        self.variance.lerp_(unbiased_variance.to(self.variance), self.momentum)


class SyncStatistics:
    """Statistics of one layer in one forward pass, merged over replicas and ranks.

    Statistics are float32, or float64 for float64 inputs. This class uses operators that every device and
    `torch.compile` support.

    Args:
        eps: added to the variance before the square root.
        clamp_variance: divide by sqrt(max(var, eps)) instead of sqrt(var + eps).
        layer_name: used in error messages.
        local: do not communicate with other ranks.

    Attributes:
        mean, variance: (C,) tensors on the device of the first input.
        count: number of values per channel, a scalar tensor.
    """

    def __init__(self, eps: float, clamp_variance: bool = False, layer_name: str = "", local: bool = False):
        self.eps, self.clamp_variance, self.layer_name = eps, clamp_variance, layer_name
        distributed = not local and dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1

    def merge(self, inputs: Sequence[Tensor], running: RunningStats | None) -> None:
        """Compute the statistics of all replicas and ranks, and update the running statistics."""
        x, channels = inputs[0], inputs[0].size(1)
        rows = torch.cat([part.to(x.device) for own in inputs for part in self._moments(own)]).view(len(inputs), -1)
        if self.world_size > 1:
            gathered = rows.new_empty(self.world_size * len(rows), rows.size(1))
            self._communicate(all_gather, gathered, rows)
            rows = gathered
        self._merge_rows(x, *rows.split([channels, channels, 1], dim=1), running)

    def sum(self, terms: Sequence[Sequence[Tensor]]) -> Tensor:
        """Sum terms over all replicas and ranks.

        Args:
            terms: T tensors (C,) per replica.

        Returns:
            (T, C) on the device of the first replica.
        """
        device = terms[0][0].device
        total = torch.stack([term.to(device) for replica in terms for term in replica])
        if len(terms) > 1:
            total = total.view(len(terms), len(terms[0]), -1).sum(0)
        if self.world_size > 1:
            self._communicate(dist.all_reduce, total)
        return total

    def _communicate(self, collective: Callable, *tensors) -> None:
        """Call a collective. If a rank ended or timed out (gloo only), raise ProcessGroupError with the layer name."""
        try:
            collective(*tensors)
        except RuntimeError as error:
            if not is_communication_error(error):
                raise
            raise ProcessGroupError(
                f"{self.layer_name}: communication failed on rank {dist.get_rank()} of {self.world_size} because "
                f"another rank ended or timed out ({first_sentence(error)})"
            ) from error

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (C,), variance (C,) and number of values per channel (1,) of one replica."""
        count, dims = x.numel() // x.size(1), [0, *range(2, x.dim())]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(x, dims, correction=0) if count else x.new_zeros(2, x.size(1))
        return mean, variance, _constant(count, mean)

    def _merge_rows(
        self, x: Tensor, means: Tensor, variances: Tensor, counts: Tensor, running: RunningStats | None
    ) -> None:
        """Merge means (R, C), variances (R, C) and counts (R, 1) of R replicas; see `merge`."""
        self.count = counts.sum()
        share = counts / self.count
        self.mean = (share * means).sum(0)  # under autocast, a matrix product would be computed in 16 bits
        difference = means - self.mean
        self.variance = (share * torch.addcmul(variances, difference, difference)).sum(0)
        if running:
            unbiased = torch.addcdiv(self.variance, self.variance, (self.count - 1).clamp(min=1))
            running.update(self.mean, unbiased)

    def _divisor(self) -> tuple[Tensor, float]:
        """Return (variance, epsilon); normalization divides by sqrt(variance + epsilon)."""
        return (self.variance.clamp(min=self.eps), 0.0) if self.clamp_variance else (self.variance, self.eps)

    @property
    def inverse_std(self) -> Tensor:
        """1 / std for each channel, (C,)."""
        variance, eps = self._divisor()
        return (variance + eps).rsqrt()

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return (x - mean) * inverse_std * weight + bias, in the dtype of x."""
        variance, eps = self._divisor()
        return F.batch_norm(x, self.mean.to(x.device), variance.to(x.device), weight, bias, eps=eps)

    def gradient_sums(self, g: Tensor, x: Tensor, weight: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the two terms of `sum` for one replica, and the gradients of weight and bias; all are (C,)."""
        _, weight_gradient, bias_gradient = self._backward(g, x, weight, [False, True, True])
        return [bias_gradient, weight_gradient], weight_gradient, bias_gradient

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
        """Return the gradient of the input of one replica; `sums` is the result of `sum`."""
        constant, slope = sums / self.count
        if self.clamp_variance:  # if variance < eps, the divisor is constant, so the variance gets no gradient
            slope = slope * (self.variance > self.eps)
        g = g - self.normalize(x, slope.to(x.device), constant.to(x.device))
        return self._backward(g, x, weight, [True, False, False])[0]

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor | None, mask: list[bool]) -> tuple[Tensor, ...]:
        """Return gradients of input, weight and bias of `normalize`, as if mean and variance were constant."""
        variance, eps = self._divisor()
        mean, variance = self.mean.to(x.device), variance.to(x.device)
        return torch.ops.aten.native_batch_norm_backward(g, x, weight, mean, variance, None, None, False, eps, mask)


class CudaSyncStatistics(SyncStatistics):
    """`SyncStatistics` with the CUDA kernels of `nn.SyncBatchNorm`, which need fewer launches and less memory traffic.

    Attributes:
        mean, inverse_std: (C,) tensors on the device of the first input.
        counts: (R, 1) int32 numbers of values per channel, one for each replica and rank.
    """

    inverse_std = None  # `merge` sets this

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (C,), inverse standard deviation (C,) and number of values per channel (1,) of one replica."""
        mean, inverse_std = torch.batch_norm_stats(_dense(x), self._kernel_eps)
        return mean, inverse_std, _constant(x.numel() // x.size(1), mean)

    @property
    def _kernel_eps(self) -> float:
        return TINY if self.clamp_variance else self.eps

    def _merge_rows(
        self, x: Tensor, means: Tensor, inverse_stds: Tensor, counts: Tensor, running: RunningStats | None
    ) -> None:
        self.counts = counts.to(torch.int32)
        buffers = running or (None, None, 0.0)
        counts = counts.view(-1) if running is None else counts.view(-1).to(running.mean)
        self.mean, self.inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, *buffers, self._kernel_eps, counts
        )
        if self.clamp_variance:
            self.inverse_std.clamp_(max=self.eps**-0.5)

    @property
    def count(self) -> Tensor:
        return self.counts.sum()

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, inverse_std = self.mean.to(x.device), self.inverse_std.to(x.device)
        return torch.batch_norm_elemt(_dense(x), weight, bias, mean, inverse_std, self.eps)

    def gradient_sums(self, g: Tensor, x: Tensor, weight: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        mean, inverse_std = self.mean.to(x.device), self.inverse_std.to(x.device)
        *sums, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            _dense(g), _dense(x), mean, inverse_std, weight, True, True, True
        )
        return sums, weight_gradient, bias_gradient

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
        sum_g, sum_gx = sums.to(x.device)
        mean, inverse_std, counts = (t.to(x.device) for t in (self.mean, self.inverse_std, self.counts))
        if self.clamp_variance:
            sum_gx = sum_gx * (inverse_std < self.eps**-0.5)
        weight = weight if weight is None else weight.to(mean.dtype)
        return torch.batch_norm_backward_elemt(_dense(g), _dense(x), mean, inverse_std, weight, sum_g, sum_gx, counts)


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch normalization of several inputs, one per replica, with the statistics of all inputs.

    `apply(stats, running, *inputs, *weights, *biases)` takes one input, weight and bias per replica and returns one
    output per replica. Inputs are (N, C, ...) and may differ in size; weights and biases are (C,) or None.
    """

    @staticmethod
    def forward(ctx, stats: SyncStatistics, running: RunningStats | None, *tensors: Tensor | None):
        inputs, weights, biases = split_evenly(tensors, 3)
        stats.merge(inputs, running)
        ctx.stats = stats
        ctx.save_for_backward(*inputs, *weights)
        return tuple(map(stats.normalize, inputs, weights, biases))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stats, (inputs, weights) = ctx.stats, split_evenly(ctx.saved_tensors, 2)
        replicas = list(zip(gradients, inputs, weights, strict=True))
        local_sums, weight_gradients, bias_gradients = zip(*(stats.gradient_sums(*r) for r in replicas), strict=True)
        sums = stats.sum(local_sums)
        input_gradients = [stats.input_gradient(*replica, sums) for replica in replicas]
        if weights[0] is None:
            weight_gradients = bias_gradients = [None] * len(replicas)
        return None, None, *input_gradients, *weight_gradients, *bias_gradients


def statistics_class(x: Tensor) -> type[SyncStatistics]:
    """Return the implementation for an input; the kernels of `CudaSyncStatistics` cannot be compiled."""
    return CudaSyncStatistics if x.is_cuda and not torch.compiler.is_compiling() else SyncStatistics


def split_evenly(tensors: Sequence[Tensor | None], parts: int) -> list[Sequence[Tensor | None]]:
    size = len(tensors) // parts
    return [tensors[i * size : (i + 1) * size] for i in range(parts)]


def _dense(x: Tensor) -> Tensor:
    """Return `x` in contiguous or channels_last memory."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _constant(value: int, like: Tensor) -> Tensor:
    """Return a tensor (1,) with the dtype and device of `like`; it is cached to save a kernel launch."""
    if torch.compiler.is_compiling():
        return like.new_full((1,), value)
    return _cached_constant(value, like.dtype, like.device)


@cache_tensors
def _cached_constant(value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device=device)


def is_communication_error(error: BaseException) -> bool:
    """Return whether an error was caused by another rank and not, for example, by lack of memory on this rank."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors; subclasses such as OutOfMemoryError have local causes.
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
