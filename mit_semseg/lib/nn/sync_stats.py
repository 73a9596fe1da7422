"""The arithmetic of synchronized batch normalization: statistics over everybody, one node of the autograd graph.

Everybody contributes count, mean and sum of squared deviations, which are merged as in Chan, Golub & LeVeque (1979), so
that the variance is never negative. There is one meeting in the forward pass and one in the backward pass. The replicas
of one process share a single node, so that their backward pass needs no threads.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils import UserError, first_sentence

# Elements worked on at a time on a CPU: 4 MiB in float32, of which the allocator keeps what is in between at hand.
BLOCK = 2**20


class ProcessGroupError(UserError, RuntimeError):
    """A process could not go on because another one ended or did not answer in time."""


class SyncStatistics:
    """Statistics of one layer in one forward pass, over everybody.

    Attributes:
        count: elements per channel, a float64 scalar.
        mean, squares: (C,) float64, mean and sum of squared deviations from it.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        eps: float,
        clamp: bool = False,
        group: dist.ProcessGroup | None = None,
        name: str = "",
        *,
        alone: bool = False,
    ):
        self.eps, self.clamp, self.group, self.name, self.alone = eps, clamp, group, name, alone

    def inverse_deviation(self, variance: Tensor) -> Tensor:
        """One over what the centred values are divided by."""
        return (variance.clamp(min=self.eps) if self.clamp else variance + self.eps).rsqrt()

    def merge(self, moments: Sequence[Tensor]) -> None:
        """Merge `moments` of the inputs, on the first one's device, with those of the other processes."""
        rows = torch.stack([row.to(moments[0].device) for row in moments])
        if not self.alone:
            rows = all_gather_rows(rows.flatten(), self.group, self.name).view(-1, rows.size(1))
        counts, means, squares = rows[:, :1], *rows[:, 1:].chunk(2, dim=1)
        self.count = counts.sum().clamp(min=1)  # nobody has any: nothing divides by zero
        self.mean = (counts * means).sum(0) / self.count
        self.squares = squares.sum(0) + (counts * (means - self.mean).square()).sum(0)

    def add_up(self, sums: Sequence[Tensor]) -> Tensor:
        """Sum of what the replicas give, on the first one's device, and of the other processes' sums."""
        total = torch.stack([own.to(sums[0].device) for own in sums]).sum(0)
        return total if self.alone else all_reduce_sum(total, self.group, self.name)


class Normalize(torch.autograd.Function):
    """Batch normalization of several inputs (one per replica, sizes may differ) with common statistics.

    `apply(meeting, *inputs[, *weights, *biases])` returns one output per input.
    """

    @staticmethod
    def forward(ctx, meeting: SyncStatistics, *tensors: Tensor) -> tuple[Tensor, ...]:
        affine = tensors[-1].dim() == 1
        replicas = len(tensors) // 3 if affine else len(tensors)
        inputs, weights, biases = tensors[:replicas], tensors[replicas : 2 * replicas], tensors[2 * replicas :]
        meeting.merge([moments(x) for x in inputs])
        variance = meeting.squares / meeting.count
        ctx.meeting, ctx.replicas = meeting, replicas
        ctx.save_for_backward(meeting.mean, variance, *inputs, *weights)
        inverse, outputs = meeting.inverse_deviation(variance), []
        for i, x in enumerate(inputs):
            factor = inverse * weights[i].to(inverse) if affine else inverse
            # What the mean loses when it is rounded to the type of x goes into the shift.
            shift = factor * (meeting.mean.to(statistics_dtype(x)).double() - meeting.mean)
            shift = shift + biases[i].to(shift) if affine else shift
            outputs.append(blockwise(scaled, (x,), (meeting.mean, factor, shift)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, variance, *tensors = ctx.saved_tensors
        meeting, replicas = ctx.meeting, ctx.replicas
        inputs, weights = tensors[:replicas], tensors[replicas:]
        own = [_gradient_sums(x, g, mean) for x, g in zip(inputs, gradients, strict=True)]
        sum_g, sum_gx = meeting.add_up(own)
        inverse = meeting.inverse_deviation(variance)
        slope = -sum_gx * inverse.square() / meeting.count
        if meeting.clamp:  # below eps the divisor is a constant, and no gradient goes through the variance
            slope = torch.where(variance > meeting.eps, slope, 0)
        input_gradients = []
        for i, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
            factor = inverse * weights[i].to(inverse) if weights else inverse
            vectors = mean, factor, factor * slope, -factor * sum_g / meeting.count
            input_gradients.append(blockwise(_input_gradient, (x, g), vectors))
        if not weights:
            return None, *input_gradients
        weight_gradients = [(s[1] * inverse.to(s)).to(w) for s, w in zip(own, weights, strict=True)]
        bias_gradients = [s[0].to(w) for s, w in zip(own, weights, strict=True)]
        return None, *input_gradients, *weight_gradients, *bias_gradients


def moments(x: Tensor) -> Tensor:
    """Count, means and sums of squared deviations from them: (1 + 2 C,) float64.

    Two passes of simple kernels: `torch.var_mean` takes many times longer on a CPU.
    """
    axes, kind = reduction_dims(x), statistics_dtype(x)
    count = x.numel() // x.size(1)
    columns = []
    for (block,) in blocks((x,)):
        mean = block.mean(axes, dtype=kind) if count else block.new_zeros(block.size(1), dtype=kind)
        centred = block - spread(mean, block)
        # Both are corrected by what rounding has left of the mean.
        rest = centred.sum(axes).double() / max(count, 1)
        squares = centred.mul_(centred).sum(axes).double() - count * rest.square()
        columns.append(torch.stack([mean.double() + rest, squares.clamp(min=0)]))
    moments = torch.cat(columns, dim=1).flatten()
    return torch.cat([moments.new_full((1,), count), moments])


def _gradient_sums(x: Tensor, gradient: Tensor, mean: Tensor) -> Tensor:
    """Per channel the sums of the output's gradient and of its product with x - mean: (2, C) float64."""
    axes, kind = reduction_dims(x), statistics_dtype(x)
    columns = []
    for block, part, center in blocks((x, gradient), (mean,)):
        product = (block - spread(center, block)).mul_(part)
        columns.append(torch.stack([part.sum(axes, dtype=kind), product.sum(axes)]).double())
    return torch.cat(columns, dim=1)


def scaled(x: Tensor, mean: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * factor + shift."""
    return (x - spread(mean, x)).mul_(spread(factor, x)).add_(spread(shift, x))


def _input_gradient(x: Tensor, g: Tensor, mean: Tensor, factor: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """g * factor + (x - mean) * slope + shift."""
    result = (x - spread(mean, x)).mul_(spread(slope, x)).add_(spread(shift, x))
    return result.addcmul_(g.to(result.dtype), spread(factor, x))


def blockwise(function: Callable[..., Tensor], tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """The result, of the first tensor's type, of an elementwise function of tensors (N, C, ...) and vectors (C,)."""
    pieces = list(blocks(tensors, vectors))
    if len(pieces) == 1:
        return function(*pieces[0]).to(tensors[0].dtype)
    result = torch.empty_like(tensors[0])
    for (part,), piece in zip(blocks((result,)), pieces, strict=True):
        part.copy_(function(*piece))
    return result


def blocks(tensors: Sequence[Tensor], vectors: Sequence[Tensor] = ()) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (N, C, ...) and vectors (C,) in blocks of channels.

    Fresh memory for large intermediate results costs a CPU more than the arithmetic, so it works in blocks. Elsewhere,
    and where channels are the innermost dimension, there is one block.
    """
    x = tensors[0]
    channels = x.size(1)
    if x.device.type == "cpu" and x.is_contiguous() and x.numel() > BLOCK:
        channels = max(1, BLOCK * channels // x.numel())
    return zip(*(t.split(channels, 1) for t in tensors), *(v.split(channels) for v in vectors), strict=True)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Type in which an input is worked on: its own, float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def reduction_dims(x: Tensor) -> list[int]:
    """Axes of (N, C, ...) but the second."""
    return [0, *range(2, x.dim())]


def channel_shape(x: Tensor) -> tuple[int, ...]:
    """Shape in which values per channel are combined with (N, C, ...)."""
    return (1, -1) + (1,) * (x.dim() - 2)


def spread(values: Tensor, x: Tensor) -> Tensor:
    """Values per channel, ready to be combined with (N, C, ...) `x` in the type of statistics."""
    return values.to(x.device, statistics_dtype(x)).view(channel_shape(x))


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes of a group (None: the default group), 1 where `torch.distributed` is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_gather_rows(vector: Tensor, group: dist.ProcessGroup | None, name: str) -> Tensor:
    """Vectors of all processes.

    Args:
        vector: (n,), of the same length everywhere.
        group: process group, None for the default one.
        name: of the layer, for the error.

    Returns:
        (processes, n), in the order of the ranks, the same on all processes.

    Raises:
        ProcessGroupError: a process ended or did not answer within the group's time-out (gloo; NCCL works in the
            background, and ends the process itself).
    """
    if world_size(group) == 1:
        return vector.unsqueeze(0)
    rows = [torch.empty_like(vector) for _ in range(world_size(group))]
    _collective(lambda: dist.all_gather(rows, vector.contiguous(), group=group), group, name)
    return torch.stack(rows)


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None, name: str) -> Tensor:
    """Sum of a tensor over all processes, in place; arguments and errors as of `all_gather_rows`."""
    if world_size(group) > 1:
        _collective(lambda: dist.all_reduce(tensor, group=group), group, name)
    return tensor


def is_communication_error(error: BaseException) -> bool:
    """Whether an error was raised by the communication with other processes, and not by this one, e.g. for lack of
    memory. gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _collective(call: Callable[[], object], group: dist.ProcessGroup | None, name: str) -> None:
    try:
        call()
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        raise ProcessGroupError(
            f"{name}: process {dist.get_rank(group)} of {dist.get_world_size(group)} waited for the others, but one "
            f"ended or did not answer in time ({first_sentence(error)})"
        ) from error
