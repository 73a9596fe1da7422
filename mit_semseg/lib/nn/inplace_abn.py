"""Batch normalization and activation in one autograd node that saves only its output.

Rota Bulò, Porzi & Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018. Leaky ReLU
is invertible and the scale is never zero, so the backward pass recovers the normalized values from the output. This
halves the memory that normalization and activation need for the backward pass. Slope 1 means no activation.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batchnorm import SynchronizedBatchNorm2d
from .sync_stats import RunningStats, SyncBatchNormFunction, SyncStatistics, split_evenly, statistics_class

# Module version in state-dict metadata; it distinguishes in-place norms from batch norms, which have the same keys.
VERSION = 3
ACTIVATIONS = ("leaky_relu", "none")


class InPlaceABNFunction(torch.autograd.Function):
    """Batch normalization and leaky ReLU of several inputs, one per replica, with the statistics of all inputs.

    `apply(stats, running, slope, *inputs, *shortcuts, *weights, *biases)` returns, for every replica,
    leaky_relu((x - mean) / sqrt(var + eps) * (|weight| + eps) + bias + shortcut). Inputs and shortcuts are
    (N, C, H, W), weights and biases (C,). Shortcuts, weights and biases may be None.
    """

    @staticmethod
    def forward(ctx, stats: SyncStatistics, running: RunningStats | None, slope: float, *tensors: Tensor | None):
        inputs, shortcuts, weights, biases = split_evenly(tensors, 4)
        stats.merge(inputs, running)
        outputs = []
        for x, shortcut, weight, bias in zip(inputs, shortcuts, weights, biases, strict=True):
            z = stats.normalize(x, effective_weight(weight, stats.eps), bias)
            outputs.append(_activate(z if shortcut is None else z.add_(shortcut), slope))
        ctx.stats, ctx.slope = stats, slope
        ctx.save_for_backward(*outputs, *shortcuts, *weights, *biases)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stats, slope = ctx.stats, ctx.slope
        outputs, shortcuts, weights, biases = split_evenly(ctx.saved_tensors, 4)
        recovered, local_sums, weight_gradients, bias_gradients = [], [], [], []
        for y, g, shortcut, weight, bias in zip(outputs, gradients, shortcuts, weights, biases, strict=True):
            z = y if slope == 1 else F.leaky_relu(y, 1 / slope)
            z = z if shortcut is None else z - shortcut
            scale = 1 if weight is None else effective_weight(weight, stats.eps)[:, None, None]
            normalized = z / scale if bias is None else (z - bias[:, None, None]) / scale
            g = _activation_gradient(y, g, slope)
            own = g.sum((0, 2, 3)), (normalized * g).sum((0, 2, 3))
            recovered.append((g, normalized, scale))
            local_sums.append(own)
            bias_gradients.append(None if bias is None else own[0])
            weight_gradients.append(None if weight is None else own[1] * torch.where(weight < 0, -1, 1))
        means = stats.sum(local_sums) / stats.count
        input_gradients = []
        for g, normalized, scale in recovered:
            mean_g, mean_gx, inverse_std = (t.to(g.device)[:, None, None] for t in (*means, stats.inverse_std))
            input_gradients.append(normalized.mul_(-mean_gx).add_(g).sub_(mean_g).mul_(inverse_std * scale))
        shortcut_gradients = [
            None if shortcut is None else g for shortcut, (g, _, _) in zip(shortcuts, recovered, strict=True)
        ]
        return None, None, None, *input_gradients, *shortcut_gradients, *weight_gradients, *bias_gradients


def effective_weight(weight: Tensor | None, eps: float) -> Tensor | None:
    """Return |weight| + eps, which is never zero; the gradient of |weight| at zero is 1."""
    return None if weight is None else torch.where(weight < 0, -weight, weight) + eps


def _activate(z: Tensor, slope: float) -> Tensor:
    return z if slope == 1 else F.leaky_relu(z, slope, inplace=not torch.is_grad_enabled())


def _activation_gradient(y: Tensor, g: Tensor, slope: float) -> Tensor:
    # Autograd uses the same operator for leaky ReLU; `torch.where` is many times slower on a CPU.
    return g if slope == 1 else torch.ops.aten.leaky_relu_backward(g, y, slope, False)


class InPlaceABN(SynchronizedBatchNorm2d):
    """Batch normalization with scale |weight| + eps, then an activation; each replica uses its own statistics.

    `activation` is 'leaky_relu' or 'none'. Only the output is saved for the backward pass. In 16-bit precision,
    the input is saved too, because the normalized values cannot be recovered accurately from the output.
    """

    synchronized = False
    _version = VERSION

    def __init__(self, num_features: int, *args, activation: str = "leaky_relu", slope: float = 0.01, **kwargs):
        super().__init__(num_features, *args, clamp_variance=False, synchronized=type(self).synchronized, **kwargs)
        if activation not in ACTIVATIONS or slope <= 0:
            raise ValueError(
                f"unsupported activation {activation!r} with slope {slope}; use 'none', or 'leaky_relu' with slope > 0"
            )
        self.activation, self.slope = activation, slope if activation == "leaky_relu" else 1.0

    def without_activation(self) -> "InPlaceABN":
        self.activation, self.slope = "none", 1.0
        return self

    def to_plain(self) -> None:
        raise ValueError(f"{self} cannot be converted to nn.BatchNorm2d; build the model with MODEL.norm sync")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, slope={self.slope}"

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Normalize each channel of (N, C, H, W), add the shortcut (same shape), and apply the activation."""
        self._check_input_dim(x)
        if self._syncs_replicas():
            return self._gather_and_normalize(x, self.weight, self.bias, shortcut)
        if self.training or not self.track_running_stats:
            return self._normalize_replicas([(x, self.weight, self.bias, shortcut)])[0]
        weight = effective_weight(self.weight, self.eps)
        y = F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, False, 0.0, self.eps)
        return self._add_activate(y, shortcut)

    def _normalize_replicas(self, arguments: list[tuple[Tensor | None, ...]]) -> Sequence[Tensor]:
        inputs, weights, biases, shortcuts = zip(*arguments, strict=True)
        if self._needs_running_stats(inputs):
            weights = [effective_weight(weight, self.eps) for weight in weights]
            outputs = self._normalize_by_running_stats(list(zip(inputs, weights, biases, strict=True)))
            return [self._add_activate(y, shortcut) for y, shortcut in zip(outputs, shortcuts, strict=True)]
        local = not (self.synchronized and self.training)
        stats = statistics_class(inputs[0])(self.eps, layer_name=self._display_name(), local=local)
        running = self._running_stats()
        if inputs[0].dtype.itemsize < torch.float32.itemsize:
            weights = [effective_weight(weight, self.eps) for weight in weights]
            outputs = SyncBatchNormFunction.apply(stats, running, *inputs, *weights, *biases)
            outputs = [self._add_activate(y, shortcut) for y, shortcut in zip(outputs, shortcuts, strict=True)]
        else:
            outputs = InPlaceABNFunction.apply(stats, running, self.slope, *inputs, *shortcuts, *weights, *biases)
        return outputs

    def _add_activate(self, y: Tensor, shortcut: Tensor | None) -> Tensor:
        return _activate(y if shortcut is None else y + shortcut, self.slope)


class InPlaceABNSync(InPlaceABN):
    """`InPlaceABN` with statistics over all replicas and ranks."""

    synchronized = True


def has_inplace_norms(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict, from `state_dict()` or from a file, belongs to a module with in-place norms."""
    return any(entry.get("version") == VERSION for entry in getattr(state, "_metadata", {}).values())
