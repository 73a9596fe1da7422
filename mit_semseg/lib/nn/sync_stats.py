"""Statistics and autograd function of synchronized batch normalization.

Counts, means and sums of squared deviations of replicas and ranks are merged as in Chan, Golub & LeVeque, "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, so the variance is never negative. The
forward pass and the backward pass each use one collective. All replicas of a process share one autograd node.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils import UserError, first_sentence

# Number of elements per block on a CPU (4 MiB in float32): the allocator reuses memory blocks of this size.
BLOCK = 2**20


class ProcessGroupError(UserError, RuntimeError):
    """Communication failed because another rank ended or timed out."""


@dataclass
class SyncStatistics:
    """Statistics of one layer in one forward pass, merged over replicas and ranks, as (C,) float64 tensors."""

    eps: float
    clamp_variance: bool = False  # divide by sqrt(max(var, eps)) instead of sqrt(var + eps)
    layer_name: str = ""  # used in error messages
    local: bool = False  # do not communicate with other ranks

    def merge(self, inputs: Sequence[Tensor]) -> None:
        """Compute the statistics of all replicas and ranks, and store them on the device of the first input."""
        distributed = not self.local and dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        rows = torch.stack([_moments(x).to(inputs[0].device) for x in inputs])
        if self.world_size > 1:
            gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
            self.communicate(dist.all_gather, gathered, rows)
            rows = torch.cat(gathered)
        counts, means, squares = rows[:, :1], *rows[:, 1:].chunk(2, dim=1)
        self.count = counts.sum().clamp(min=1)  # avoid division by zero for an empty batch
        self.mean = (counts * means).sum(0) / self.count
        squared_deviations = squares.sum(0) + (counts * (means - self.mean).square()).sum(0)
        self.variance = squared_deviations / self.count
        self.unbiased_variance = squared_deviations / (self.count - 1).clamp(min=1)
        divisor = self.variance.clamp(min=self.eps) if self.clamp_variance else self.variance + self.eps
        self.inverse_std = divisor.rsqrt()

    def sum(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the sum over all replicas (one term each) and ranks, on the device of the first term."""
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum(0)
        if self.world_size > 1:
            self.communicate(dist.all_reduce, total)
        return total

    def communicate(self, collective: Callable, *tensors) -> None:
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

    def scale(self, weight: Tensor | None) -> Tensor:
        """Return weight / std as a (C,) float64 tensor."""
        return self.inverse_std if weight is None else self.inverse_std * weight.to(self.inverse_std)

    def scale_and_shift(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the arguments `scale` and `shift` of `normalize`, (C,) float64 tensors."""
        scale = self.scale(weight)
        # The first term corrects the error of rounding the mean to the compute dtype of x.
        shift = scale * (self.mean.to(compute_dtype(x)).double() - self.mean)
        return scale, shift if bias is None else shift + bias.to(shift)


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch normalization of several inputs, one per replica, with the statistics of all inputs.

    `apply(stats, *inputs, *weights, *biases)` takes one input, weight and bias per replica and returns one output
    per replica. Inputs are (N, C, ...) and may differ in size; weights and biases are (C,) or None.
    """

    @staticmethod
    def forward(ctx, stats: SyncStatistics, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs, weights, biases = split_evenly(tensors, 3)
        stats.merge(inputs)
        ctx.stats = stats
        ctx.save_for_backward(*inputs, *weights)
        return tuple(
            blockwise(normalize, (x,), (stats.mean, *stats.scale_and_shift(x, weight, bias)))
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stats = ctx.stats
        inputs, weights = split_evenly(ctx.saved_tensors, 2)
        pairs = zip(inputs, gradients, strict=True)
        local_sums = [channel_sums(_gradient_sums, pair, (stats.mean,)) for pair in pairs]
        sum_g, sum_gx = stats.sum(local_sums)
        slope = -sum_gx * stats.inverse_std.square() / stats.count
        if stats.clamp_variance:  # if variance < eps, the divisor is constant, so the variance gets no gradient
            slope = torch.where(stats.variance > stats.eps, slope, 0)
        input_gradients, weight_gradients, bias_gradients = [], [], []
        for x, g, weight, (own_g, own_gx) in zip(inputs, gradients, weights, local_sums, strict=True):
            scale = stats.scale(weight)
            vectors = stats.mean, scale, scale * slope, -scale * sum_g / stats.count
            input_gradients.append(blockwise(_input_gradient, (x, g), vectors))
            weight_gradients.append(None if weight is None else (own_gx * stats.inverse_std.to(own_gx)).to(weight))
            bias_gradients.append(None if weight is None else own_g.to(weight))
        return None, *input_gradients, *weight_gradients, *bias_gradients


def split_evenly(tensors: Sequence[Tensor | None], parts: int) -> list[Sequence[Tensor | None]]:
    size = len(tensors) // parts
    return [tensors[i * size : (i + 1) * size] for i in range(parts)]


def _moments(x: Tensor) -> Tensor:
    """Return a (1 + 2 C,) float64 tensor: number of values per channel, C means, C sums of squared deviations."""
    means_and_squares = channel_sums(_mean_and_squared_deviations, (x,)).flatten()
    return torch.cat([means_and_squares.new_full((1,), x.numel() // x.size(1)), means_and_squares])


def _mean_and_squared_deviations(x: Tensor) -> tuple[Tensor, Tensor]:
    # Use two passes of simple kernels; `torch.var_mean` is many times slower on a CPU.
    dims, dtype, count = reduction_dims(x), compute_dtype(x), x.numel() // x.size(1)
    mean = x.mean(dims, dtype=dtype) if count else x.new_zeros(x.size(1), dtype=dtype)
    centered = x - channel_view(mean, x)
    # The mean of the centered values is the rounding error of `mean`; use it to correct the mean and the squares.
    error = centered.sum(dims).double() / max(count, 1)
    squares = centered.mul_(centered).sum(dims).double() - count * error.square()
    return mean.double() + error, squares.clamp(min=0)


def _gradient_sums(x: Tensor, g: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    product = (x - channel_view(mean, x)).mul_(g)
    return g.sum(reduction_dims(x), dtype=compute_dtype(x)), product.sum(reduction_dims(x))


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return (x - mean) * scale + shift."""
    return (x - channel_view(mean, x)).mul_(channel_view(scale, x)).add_(channel_view(shift, x))


def _input_gradient(x: Tensor, g: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """Return g * scale + (x - mean) * slope + shift."""
    result = normalize(x, mean, slope, shift)
    return result.addcmul_(g.to(result.dtype), channel_view(scale, x))


def channel_sums(function: Callable, tensors: Sequence[Tensor | None], vectors: Sequence[Tensor] = ()) -> Tensor:
    """Call `function` for each block of channels; it returns n sums per channel. Return all sums as (n, C) float64."""
    return torch.cat([torch.stack(function(*block)).double() for block in blocks(tensors, vectors)], dim=1)


def blockwise(function: Callable, tensors: Sequence[Tensor | None], vectors: Sequence[Tensor]) -> Tensor:
    """Apply an elementwise function block by block; return the result in the dtype of the first tensor."""
    arguments = list(blocks(tensors, vectors))
    if len(arguments) == 1:
        return function(*arguments[0]).to(tensors[0].dtype)
    result = torch.empty_like(tensors[0])
    for (block,), block_arguments in zip(blocks((result,)), arguments, strict=True):
        block.copy_(function(*block_arguments))
    return result


def blocks(tensors: Sequence[Tensor | None], vectors: Sequence[Tensor] = ()) -> Iterator[tuple[Tensor | None, ...]]:
    """Split tensors (N, C, ...) and vectors (C,) into blocks of channels; yield (*tensors, *vectors) of each block.

    Only large contiguous CPU tensors are split. On a CPU, allocating large results takes longer than the arithmetic.
    """
    x = tensors[0]
    step = channels = x.size(1)
    if x.device.type == "cpu" and x.is_contiguous() and x.numel() > BLOCK:
        step = max(1, BLOCK * channels // x.numel())
    for i in range(0, channels, step):
        tensor_blocks = (None if t is None else t[:, i : i + step] for t in tensors)
        yield *tensor_blocks, *(v[i : i + step] for v in vectors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for arithmetic on `x`: float32 for 16-bit tensors, else the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def reduction_dims(x: Tensor) -> list[int]:
    """Return the indices of all dimensions of `x` (N, C, ...) except C."""
    return [0, *range(2, x.dim())]


def channel_view(values: Tensor, x: Tensor) -> Tensor:
    """Convert (C,) values to the device and compute dtype of `x` (N, C, ...), with a shape that broadcasts to `x`."""
    return values.to(x.device, compute_dtype(x)).view((1, -1) + (1,) * (x.dim() - 2))


def is_communication_error(error: BaseException) -> bool:
    """Return whether an error was caused by another rank and not, for example, by lack of memory on this rank."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors; subclasses such as OutOfMemoryError have local causes.
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
