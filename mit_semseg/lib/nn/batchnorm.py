"""Batch normalization whose statistics are taken over all replicas of a process and all processes of a group.

The classes are ordinary `torch.nn.BatchNorm*d` modules: same parameters, buffers and state-dict keys. On one device
they are PyTorch's own kernel. Otherwise everybody contributes count, mean and sum of squared deviations, which are
merged as in Chan, Golub & LeVeque (1979): the variance is never negative. There is one meeting in the forward pass and
one in the backward pass; the replicas of one process share a single node of the autograd graph, so that their backward
pass needs no threads.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .sync import ReplicaGroup, gather_over_processes, process_count, sum_over_processes


class _SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three classes share.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as of `nn.BatchNorm2d`.
        clamp_variance: where statistics are shared, divide by sqrt(max(var, eps)), as the published models were
            trained, and not by PyTorch's sqrt(var + eps).

    Attributes:
        process_group: processes to synchronize with; None means all of them, where `torch.distributed` is in use.
    """

    clamp_variance = True
    process_group: dist.ProcessGroup | None = None
    _name = ""
    _replicas: ReplicaGroup | None = None  # set on replicas only
    _rank = 0

    def __init__(self, *args, clamp_variance: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.clamp_variance = clamp_variance

    def forward(self, x: Tensor) -> Tensor:
        """Normalize per channel.

        Args:
            x: (N, C, ...) of any floating type.

        Returns:
            A tensor of the shape and type of `x`.

        Raises:
            ReplicaStopped, ProcessStopped: another replica or process failed or did not arrive in time.
        """
        self._check_input_dim(x)
        if self.training and self._replicas is not None and self._replicas.size > 1:
            given = x, self.weight, self.bias
            return self._replicas.together(self._rank, self._called(), given, self._normalize_together)
        if self.training and process_count(self.process_group) > 1:
            return self._normalize_together([(x, self.weight, self.bias)])[0]
        if self.training and self.track_running_stats and x.numel() == x.size(1):
            return self._single_value(x)
        return super().forward(x)

    def join(self, replicas: ReplicaGroup | None, rank: int = 0, name: str = "") -> None:
        """Take part in a group of replicas from the next forward pass on.

        Args:
            replicas: the group; None leaves it.
            rank: of this replica.
            name: what errors call this layer.
        """
        self._replicas, self._rank, self._name = replicas, rank, name

    def _called(self) -> str:
        return self._name or f"{type(self).__name__}({self.num_features})"

    def _normalize_together(self, given: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> Sequence[Tensor]:
        """Outputs of all replicas of this process from their (input, weight, bias); learns the running estimates."""
        inputs, weights, biases = zip(*given, strict=True)
        meeting = _Meeting(self.eps, self.clamp_variance, self.process_group, self._called())
        outputs = _Normalize.apply(meeting, *inputs, *(weights + biases if self.affine else ()))
        if self.track_running_stats:
            with torch.no_grad():
                self._update_running(meeting.mean, meeting.squares / (meeting.count - 1).clamp(min=1))
        return outputs

    def _single_value(self, x: Tensor) -> Tensor:
        # One value per channel has no variance (a 1x1 pooled map of a batch of one): a batch estimate would erase the
        # input. Learn the running estimates from the deviation to the running mean and normalize with those.
        with torch.no_grad():
            value = x.detach().flatten().to(self.running_mean.dtype)
            self._update_running(value, (value - self.running_mean).square())
        shape = _along_channels(x)
        y = (x - self.running_mean.view(shape)) * torch.rsqrt(self.running_var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), momentum)


class SynchronizedBatchNorm1d(_SynchronizedBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics over all replicas and processes; input (N, C) or (N, C, L)."""


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics over all replicas and processes; input (N, C, H, W).

    Unlike `nn.BatchNorm2d` it also trains on a single value per channel (a 1x1 map of one image): see `_single_value`.
    """


class SynchronizedBatchNorm3d(_SynchronizedBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics over all replicas and processes; input (N, C, D, H, W)."""


_PLAIN = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    nn.BatchNorm3d: SynchronizedBatchNorm3d,
}


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make every `nn.BatchNorm1d/2d/3d` in a module a synchronized one.

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
    return module


def to_batchnorm(module: nn.Module) -> nn.Module:
    """Make every synchronized batch norm in a module a plain `nn.BatchNorm*`, e.g. for export; the opposite of
    `convert_sync_batchnorm`, in place as well.

    Returns:
        `module`.
    """
    plain = {synchronized: kind for kind, synchronized in _PLAIN.items()}
    for part in module.modules():
        if type(part) in plain:
            part.__class__ = plain[type(part)]
            for name in ("clamp_variance", "process_group", "_replicas", "_rank", "_name"):
                vars(part).pop(name, None)
    return module


class _Meeting:
    """Statistics of one layer in one forward pass, over everybody.

    Attributes:
        count: elements per channel, a float64 scalar.
        mean, squares: (C,) float64, mean and sum of squared deviations from it.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, eps: float, clamp: bool, group: dist.ProcessGroup | None, name: str):
        self.eps, self.clamp, self.group, self.name = eps, clamp, group, name

    def inverse_deviation(self, variance: Tensor) -> Tensor:
        """One over what the centred values are divided by."""
        return (variance.clamp(min=self.eps) if self.clamp else variance + self.eps).rsqrt()

    def merge(self, moments: Sequence[Tensor]) -> None:
        """Merge `_moments` of the inputs, on the first one's device, with those of the other processes."""
        rows = torch.stack([row.to(moments[0].device) for row in moments])
        rows = gather_over_processes(rows.flatten(), self.group, self.name).view(-1, rows.size(1))
        counts, means, squares = rows[:, :1], *rows[:, 1:].chunk(2, dim=1)
        self.count = counts.sum()
        self.mean = (counts * means).sum(0) / self.count
        self.squares = squares.sum(0) + (counts * (means - self.mean).square()).sum(0)


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x minus its own means, the means (C,), and (1 + 2 C,) float64 moments: count, means, sums of squared deviations.

    Two passes of simple kernels: `torch.var_mean` takes many times longer on a CPU.
    """
    axes, kind = _but_channels(x), _statistics_type(x)
    count = x.numel() // x.size(1)
    mean = x.mean(axes, dtype=kind) if count else x.new_zeros(x.size(1), dtype=kind)
    centred = x - _spread(mean, x)
    squares = (centred * centred).sum(axes)
    return centred, mean, torch.cat([mean.new_full((1,), count).double(), mean.double(), squares.double()])


class _Normalize(torch.autograd.Function):
    """Batch normalization of several inputs (one per replica, sizes may differ) with common statistics.

    `apply(meeting, *inputs[, *weights, *biases])` returns one output per input.
    """

    @staticmethod
    def forward(ctx, meeting: _Meeting, *tensors: Tensor) -> tuple[Tensor, ...]:
        affine = tensors[-1].dim() == 1
        replicas = len(tensors) // 3 if affine else len(tensors)
        inputs, weights, biases = tensors[:replicas], tensors[replicas : 2 * replicas], tensors[2 * replicas :]
        centred = [_centred(x) for x in inputs]
        meeting.merge([moments for _, _, moments in centred])
        variance = meeting.squares / meeting.count
        ctx.meeting, ctx.replicas = meeting, replicas
        ctx.save_for_backward(meeting.mean, variance, *inputs, *weights)
        inverse, outputs = meeting.inverse_deviation(variance), []
        for i, (y, own_mean, _) in enumerate(centred):  # y becomes the output in place
            factor = inverse.to(y) * weights[i] if affine else inverse.to(y)
            shift = (own_mean - meeting.mean.to(y.device)).to(y) * factor
            y.mul_(_spread(factor, y)).add_(_spread(shift + biases[i] if affine else shift, y))
            outputs.append(y.to(inputs[i].dtype))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, variance, *tensors = ctx.saved_tensors
        meeting, replicas = ctx.meeting, ctx.replicas
        inputs, weights = tensors[:replicas], tensors[replicas:]
        centred = [x - _spread(mean, x) for x in inputs]
        own = [_gradient_sums(x, g) for x, g in zip(centred, gradients, strict=True)]
        total = torch.stack([sums.to(mean.device) for sums in own]).sum(0)
        sum_g, sum_gx = sum_over_processes(total, meeting.group, meeting.name)
        inverse = meeting.inverse_deviation(variance)
        slope = -sum_gx * inverse.square() / meeting.count
        if meeting.clamp:  # below eps the divisor is a constant, and no gradient goes through the variance
            slope = torch.where(variance > meeting.eps, slope, 0)
        input_gradients = []
        for i, (x, g) in enumerate(zip(centred, gradients, strict=True)):  # x becomes the gradient in place
            factor = inverse * weights[i].to(inverse) if weights else inverse
            x.mul_(_spread(factor * slope, x)).sub_(_spread(factor * sum_g / meeting.count, x))
            input_gradients.append(x.addcmul_(g.to(x.dtype), _spread(factor, x)).to(inputs[i].dtype))
        if not weights:
            return None, *input_gradients
        weight_gradients = [(s[1] * inverse.to(s)).to(w) for s, w in zip(own, weights, strict=True)]
        bias_gradients = [s[0].to(w) for s, w in zip(own, weights, strict=True)]
        return None, *input_gradients, *weight_gradients, *bias_gradients


def _gradient_sums(centred: Tensor, gradient: Tensor) -> Tensor:
    """Per channel the sums of the output's gradient and of its product with the centred input: (2, C) float64."""
    axes = _but_channels(centred)
    return torch.stack([gradient.sum(axes, dtype=centred.dtype), (centred * gradient).sum(axes)]).double()


def _statistics_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along_channels(x: Tensor) -> tuple[int, ...]:
    return (1, -1) + (1,) * (x.dim() - 2)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values per channel, ready to be combined with (N, C, ...) `x` in the type of statistics."""
    return values.to(x.device, _statistics_type(x)).view(_along_channels(x))
