"""Batch normalization and activation in one node that keeps only its output for the backward pass.

Rota Bulò, Porzi & Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018: the
activation can be inverted and the scale is never zero, so what the backward pass needs is recovered from the output.
The input is not kept (nothing else keeps a convolution's result), which halves the memory of normalization and
activation. A shortcut that is added before the activation needs not be kept twice either.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batchnorm import SynchronizedBatchNorm2d
from .sync_stats import (
    Normalize,
    SyncStatistics,
    blocks,
    blockwise,
    moments,
    reduction_dims,
    scaled,
    spread,
    statistics_dtype,
)

# Of the modules' entries in the metadata of a state dict, by which a file of in-place norms is told: its keys are those
# of ordinary ones. (PyTorch's batch norm has version 2.)
VERSION = 3
ACTIVATIONS = ("leaky_relu", "elu", "none")
_OTHER_NAMES = {"identity": "none"}


class Activation:
    """An activation that can be inverted.

    Args:
        name: 'leaky_relu', 'elu' or 'none'.
        slope: of the negative part of leaky ReLU, > 0; of ELU the limit it goes to.

    Raises:
        ValueError: another name, or a slope that cannot be inverted.
    """

    def __init__(self, name: str = "leaky_relu", slope: float = 0.01):
        name = _OTHER_NAMES.get(name, name)
        if name not in ACTIVATIONS:
            raise ValueError(f"activation {name!r}: choose one of {', '.join(ACTIVATIONS)} (a ReLU cannot be inverted)")
        if name != "none" and slope <= 0:
            raise ValueError(f"slope {slope} of {name}: it must be above 0 to be inverted")
        self.name, self.slope = name, slope

    def __call__(self, z: Tensor) -> Tensor:
        """Activated values, differentiable; written over `z` where no gradients are recorded."""
        inplace = not torch.is_grad_enabled()
        if self.name == "leaky_relu":
            return F.leaky_relu(z, self.slope, inplace=inplace)
        return F.elu(z, self.slope, inplace=inplace) if self.name == "elu" else z

    def inverse(self, y: Tensor) -> Tensor:
        """What was activated, from its result."""
        if self.name == "leaky_relu":
            return F.leaky_relu(y, 1 / self.slope)
        if self.name == "elu":  # where it has saturated the smallest value that does not is as good
            lowest = torch.finfo(y.dtype).eps - 1
            return torch.where(y < 0, (y / self.slope).clamp(min=lowest).log1p(), y)
        return y

    def gradient(self, y: Tensor, g: Tensor) -> Tensor:
        """Gradient before the activation, from its result and the gradient after it."""
        # The operators behind autograd's formulas; `torch.where` takes many times longer on a CPU.
        if self.name == "leaky_relu":
            return torch.ops.aten.leaky_relu_backward(g, y, self.slope, False)
        return torch.ops.aten.elu_backward(g, self.slope, 1, 1, True, y) if self.name == "elu" else g


class NormalizeInPlace(torch.autograd.Function):
    """Activated batch normalization of several inputs (one per replica) with common statistics.

    `apply(meeting, activation, replicas, shortcuts, *inputs, [*shortcuts,] [*weights, *biases])` returns one output per
    input: activation((x - mean) / sqrt(var + eps) * (|weight| + eps) + bias + shortcut).
    """

    @staticmethod
    def forward(
        ctx, meeting: SyncStatistics, activation: Activation, replicas: int, has_shortcut: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        parts = [tensors[i : i + replicas] for i in range(0, len(tensors), replicas)]
        inputs, shortcuts = parts[0], parts[1] if has_shortcut else ()
        weights, biases = parts[-2:] if len(parts) > 1 + has_shortcut else ((), ())
        meeting.merge([moments(x) for x in inputs])
        inverse = meeting.inverse_deviation(meeting.squares / meeting.count)
        outputs = []
        for i, x in enumerate(inputs):
            factor = inverse * scale_of(weights[i], meeting.eps).to(inverse) if weights else inverse
            # What the mean loses when it is rounded to the type of x goes into the shift.
            shift = factor * (meeting.mean.to(statistics_dtype(x)).double() - meeting.mean)
            shift = shift + biases[i].to(shift) if weights else shift
            vectors = meeting.mean, factor, shift
            if has_shortcut:
                outputs.append(
                    blockwise(lambda x, s, *v: activation(scaled(x, *v).add_(s)), (x, shortcuts[i]), vectors)
                )
            else:
                outputs.append(blockwise(lambda x, *v: activation(scaled(x, *v)), (x,), vectors))
        ctx.meeting, ctx.activation, ctx.replicas = meeting, activation, replicas
        ctx.has_shortcut, ctx.affine = has_shortcut, bool(weights)
        ctx.save_for_backward(inverse, *outputs, *shortcuts, *weights, *biases)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inverse, *tensors = ctx.saved_tensors
        meeting, activation, n = ctx.meeting, ctx.activation, ctx.replicas
        parts = [tuple(tensors[i : i + n]) for i in range(0, len(tensors), n)]
        outputs, shortcuts = parts[0], parts[1] if ctx.has_shortcut else ((),) * n
        weights, biases = parts[-2:] if ctx.affine else ((), ())
        scales = [scale_of(w, meeting.eps).double() for w in weights] or [torch.ones_like(inverse)] * n
        shifts = [b.double() for b in biases] or [torch.zeros_like(inverse)] * n

        given = [
            ((y, g, s) if ctx.has_shortcut else (y, g)) for y, g, s in zip(outputs, gradients, shortcuts, strict=True)
        ]
        own = [_sums(activation, *args) for args in zip(given, scales, shifts, strict=True)]
        sum_g, sum_gx = meeting.add_up(own)
        input_gradients, shortcut_gradients = [], []
        for kept, scale, shift in zip(given, scales, shifts, strict=True):
            factor = inverse * scale.to(inverse)
            vectors = shift, 1 / scale, factor, -factor * sum_gx / meeting.count, -factor * sum_g / meeting.count
            input_gradients.append(blockwise(lambda *t: _input_gradient(activation, *t), kept, vectors))
            if ctx.has_shortcut:
                shortcut_gradients.append(activation.gradient(*kept[:2]))
        weight_gradients = [
            (s[1] * torch.where(w < 0, -1, 1)).to(w) for s, w in zip(own, weights, strict=False)
        ]  # of the absolute value
        bias_gradients = [s[0].to(b) for s, b in zip(own, biases, strict=False)]
        return None, None, None, None, *input_gradients, *shortcut_gradients, *weight_gradients, *bias_gradients


def scale_of(weight: Tensor, eps: float) -> Tensor:
    """What a layer multiplies with: |weight| + eps, which can be divided by; its slope at zero is one, not none."""
    return torch.where(weight < 0, -weight, weight) + eps


def _recovered(activation: Activation, y: Tensor, g: Tensor, shortcut: Tensor | None, shift: Tensor, divisor: Tensor):
    """Normalized values and the gradient before the activation, in the type of statistics."""
    kind = statistics_dtype(y)
    y, g = y.to(kind), g.to(kind)
    z = activation.inverse(y)
    z = z if shortcut is None else z - shortcut
    return (z - spread(shift, y)) * spread(divisor, y), activation.gradient(y, g)


def _sums(activation: Activation, tensors: Sequence[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    """Per channel the sums of the gradient and of its product with the normalized values: (2, C) float64."""
    axes, columns = reduction_dims(tensors[0]), []
    for block in blocks(tensors, (shift, 1 / scale)):
        *parts, own_shift, divisor = block
        y, g, shortcut = (*parts, None)[:3]
        normalized, gradient = _recovered(activation, y, g, shortcut, own_shift, divisor)
        columns.append(torch.stack([gradient.sum(axes), normalized.mul_(gradient).sum(axes)]).double())
    return torch.cat(columns, dim=1)


def _input_gradient(activation: Activation, *arguments: Tensor) -> Tensor:
    *tensors, shift, divisor, factor, slope, constant = arguments
    y, g, shortcut = (*tensors, None)[:3]
    normalized, gradient = _recovered(activation, y, g, shortcut, shift, divisor)
    result = normalized.mul_(spread(slope, y)).add_(spread(constant, y))
    return result.addcmul_(gradient, spread(factor, y))


class InPlaceABN(SynchronizedBatchNorm2d):
    """Batch normalization with the statistics of this device, and the activation after it; keeps only its output.

    Multiplies with |weight| + eps, so that the scale is never zero. In eval mode it is ordinary normalization and
    activation. So it is for 16-bit inputs: their outputs are too coarse to recover anything from, no memory is saved.

    Args:
        num_features, eps, momentum, affine, device, dtype: as of `nn.BatchNorm2d`.
        activation: 'leaky_relu', 'elu', or 'none' ('identity').
        slope: of the activation, see `Activation`.

    Raises:
        ValueError: an activation that cannot be inverted.
    """

    synchronized = False
    _version = VERSION

    def __init__(
        self, num_features: int, *args, activation: str = "leaky_relu", slope: float = 0.01, synchronized=None, **kwargs
    ):
        synchronized = type(self).synchronized if synchronized is None else synchronized
        super().__init__(num_features, *args, clamp_variance=False, synchronized=synchronized, **kwargs)
        self._activation = Activation(activation, slope)

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._activation.name

    @property
    def slope(self) -> float:
        """Slope of the activation, see `Activation`."""
        return self._activation.slope

    def without_activation(self) -> "InPlaceABN":
        """This norm, from now on without activation."""
        self._activation = Activation("none")
        return self

    def to_plain(self) -> None:
        """See `to_batchnorm`; the scale becomes |weight| + eps."""
        if self.activation != "none":
            raise ValueError(f"{self} has its activation in it, which no nn.BatchNorm2d has")
        if self.affine:
            with torch.no_grad():
                self.weight.copy_(self._scale())
        vars(self).pop("_activation")
        super().to_plain()

    def extra_repr(self) -> str:
        """For printing the module."""
        return f"{super().extra_repr()}, activation={self.activation}, slope={self.slope}"

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Normalize per channel, add the shortcut if there is one, activate.

        Args:
            x: (N, C, H, W) of any floating type.
            shortcut: (N, C, H, W), kept for the backward pass beside the output.

        Returns:
            A tensor of the shape and type of `x`.

        Raises:
            ReplicaError, ProcessGroupError: another replica or process failed or did not arrive in time.
        """
        self._check_channels(x)
        given = x, self.weight, self.bias, shortcut
        if self._meets_replicas():
            return self._replicas.together(self._rank, self._called(), given, self._normalize_together)
        if self._is_single_value(x) and not self._meets_processes():
            return self._finish(self._single_value(x), shortcut)
        if self.training or not self.track_running_stats:
            return self._normalize_together([given])[0]
        weight = scale_of(self.weight, self.eps) if self.affine else None
        y = F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, False, 0.0, self.eps)
        return self._finish(y, shortcut)

    def _finish(self, y: Tensor, shortcut: Tensor | None) -> Tensor:
        return self._activation(y if shortcut is None else y + shortcut)

    def _scale(self) -> Tensor:
        return scale_of(self.weight, self.eps)

    def _normalize_together(self, given: list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]):
        """Outputs of all replicas from their (input, weight, bias, shortcut); learns the running estimates."""
        inputs, weights, biases, shortcuts = zip(*given, strict=True)
        alone = not self.synchronized or not self.training
        meeting = SyncStatistics(self.eps, False, self.process_group, self._called(), alone=alone)
        if inputs[0].dtype.itemsize < torch.float32.itemsize:
            scales = [scale_of(weight, self.eps) for weight in weights] if self.affine else ()
            normalized = Normalize.apply(meeting, *inputs, *scales, *(biases if self.affine else ()))
            outputs = [self._finish(y, shortcut) for y, shortcut in zip(normalized, shortcuts, strict=True)]
        else:
            has_shortcut = shortcuts[0] is not None
            tensors = (*inputs, *(shortcuts if has_shortcut else ()), *((*weights, *biases) if self.affine else ()))
            outputs = NormalizeInPlace.apply(meeting, self._activation, len(given), has_shortcut, *tensors)
        if self.track_running_stats and self._learns:
            with torch.no_grad():
                self._update_running(meeting.mean, meeting.squares / (meeting.count - 1).clamp(min=1))
        return outputs


class InPlaceABNSync(InPlaceABN):
    """`InPlaceABN` with statistics over all replicas and processes.

    Keeps the function of a network without in-place norms as `functools.partial(InPlaceABNSync, activation="none")`.
    """

    synchronized = True


def has_inplace_norms(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict, as `state_dict()` gave it and files keep it, is of a module with in-place norms."""
    return any(entry.get("version") == VERSION for entry in getattr(state, "_metadata", {}).values())
