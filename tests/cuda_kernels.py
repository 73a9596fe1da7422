"""CPU implementations of the CUDA kernels of synchronized batch norm, in float64, and a counter of operators."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mit_semseg.lib.nn import batchnorm, inplace_abn
from mit_semseg.lib.nn.sync_stats import CudaSyncStatistics

_library = torch.library.Library("aten", "IMPL", "CPU")
# Operators that launch no kernel on a GPU.
FREE = {
    *("_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty"),
    *(
        "permute",
        "promote_types",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
    ),
    *("unbind", "unsqueeze", "view"),
}


def _channels(x):
    """Return the values of each channel in float64, (C, values)."""
    return x.double().transpose(0, 1).flatten(1)


def _view(vector, x):
    return vector.double().view(1, -1, *[1] * (x.dim() - 2))


def _statistics(x, *vectors):
    kind = torch.promote_types(x.dtype, torch.float32)
    return tuple(vector.to(kind) for vector in vectors)


def stats(x, eps):
    values = _channels(x)
    return _statistics(x, values.mean(1), (values.var(1, correction=0) + eps).rsqrt())


def gather_stats_with_counts(x, means, inverse_stds, running_mean, running_var, momentum, eps, counts):
    means, variances, counts = means.double(), inverse_stds.double() ** -2 - eps, counts.double()[:, None]
    mean = (counts * means).sum(0) / counts.sum()
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / counts.sum()
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_((variance * counts.sum() / (counts.sum() - 1)).to(running_var), momentum)
    return _statistics(x, mean, (variance + eps).rsqrt())


def elemt(x, weight, bias, mean, inverse_std, eps):
    y = (x.double() - _view(mean, x)) * _view(inverse_std, x)
    return (y if weight is None else y * _view(weight, x) + _view(bias, x)).to(x)


def backward_reduce(g, x, mean, inverse_std, weight, *needed):
    sum_g, sum_gx = _channels(g).sum(1), (_channels(g) * _channels(x.double() - _view(mean, x))).sum(1)
    return _statistics(x, sum_g, sum_gx, sum_gx * inverse_std, sum_g)


def backward_elemt(g, x, mean, inverse_std, weight, sum_g, sum_gx, counts):
    assert counts.dtype == torch.int32
    assert counts.is_contiguous()
    sum_g, sum_gx = sum_g / counts.sum(), sum_gx * inverse_std.square() / counts.sum()
    factor = inverse_std if weight is None else inverse_std * weight
    return ((g.double() - _view(sum_g, x) - (x.double() - _view(mean, x)) * _view(sum_gx, x)) * _view(factor, x)).to(x)


for function in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
    _library.impl(f"batch_norm_{function.__name__}", function)


def use_cuda_kernels(monkeypatch=None):
    """Let norms on the CPU use `CudaSyncStatistics`."""
    for module in (batchnorm, inplace_abn):
        patch = monkeypatch.setattr if monkeypatch else setattr
        patch(module, "statistics_class", lambda x: CudaSyncStatistics)


class CountOperators(TorchDispatchMode):
    """Counts the operators that would launch a kernel on a GPU, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += name not in FREE
        return function(*args, **(kwargs or {}))
