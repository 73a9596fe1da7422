"""In-place activated batch norm, compared with batch norm followed by the activation."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mit_semseg.engine import World
from mit_semseg.engine.distributed import broadcast_buffers
from mit_semseg.lib.nn import DataParallelWithCallback, InPlaceABN, InPlaceABNSync, sync_stats, to_batchnorm
from mit_semseg.lib.nn.inplace_abn import ACTIVATIONS, InPlaceABNFunction
from mit_semseg.lib.nn.sync_stats import SyncBatchNormFunction, SyncStatistics
from mit_semseg.models.layers import NORMS
from mit_semseg.models.weight_files import WeightsError
from mit_semseg.models.weights import load_weights

SHAPE = (3, 4, 5, 6)


def randn(*shape, **options):
    return torch.randn(shape or SHAPE, dtype=torch.float64, **options)


class Reference(nn.Module):
    """Batch norm with the scale |weight| + eps, then the addition of the shortcut, then the activation."""

    def __init__(self, norm: InPlaceABN):
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features, affine=norm.affine).to(norm.running_mean.dtype)
        self.norm.load_state_dict(norm.state_dict())
        self.activation, self.slope = norm.activation, norm.slope

    def forward(self, x, shortcut=0.0):
        norm = self.norm
        weight = norm.weight.abs() + norm.eps if norm.affine else None
        y = F.batch_norm(x, norm.running_mean, norm.running_var, weight, norm.bias, self.training, 0.1, norm.eps)
        return F.leaky_relu(y + shortcut, self.slope) if self.activation == "leaky_relu" else y + shortcut


def make_norm(activation, kind=InPlaceABN, **options):
    torch.manual_seed(0)
    norm = kind(SHAPE[1], activation=activation, **options).double()
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm


def output_and_gradients(module, tensors, factor):
    """Return a list with the output, and the gradients of sum(output * factor) for all inputs and parameters."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    module.zero_grad()
    y = module(*tensors)
    (y * factor).sum().backward()
    return [y.detach(), *(t.grad for t in tensors), *(p.grad for p in module.parameters())]


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_batch_norm_and_activation(activation, affine, with_shortcut):
    norm = make_norm(activation, affine=affine)
    reference = Reference(norm)
    tensors = [randn() * 2 + 5] + [randn()] * with_shortcut
    factor = randn()
    assert_close(output_and_gradients(norm, tensors, factor), output_and_gradients(reference, tensors, factor))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), getattr(reference.norm, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.eval()(*tensors), reference.eval()(*tensors))


def test_replicas_equal_whole_batch():
    norm, x, factor = make_norm("leaky_relu", InPlaceABNSync), randn(), randn()
    expected = output_and_gradients(Reference(norm), [x], factor)
    assert_close(output_and_gradients(DataParallelWithCallback(norm, ["cpu", "cpu"]), [x], factor), expected)


def _broadcast_on_rank(rank):
    norm, synchronized = make_norm("leaky_relu"), make_norm("leaky_relu", InPlaceABNSync)
    norm(randn() + 10 * rank), synchronized(randn() + 10 * rank)
    before = norm.running_mean.tolist()
    broadcast_buffers(nn.Sequential(norm), World(rank, 2))
    return before, norm.running_mean.tolist(), synchronized.running_mean.tolist()


def test_local_statistics_are_those_of_rank_0_after_broadcast(tmp_path):
    (before_0, after_0, mean_0), (before_1, after_1, mean_1) = on_ranks(2, tmp_path, _broadcast_on_rank)
    assert after_0 == after_1 == before_0 != before_1
    assert mean_0 == mean_1 != before_0


def test_local_statistics_of_replicas():
    norm = make_norm("none", affine=False)
    chunks = [randn(2, *SHAPE[1:]) + shift for shift in (0, 10)]
    y = DataParallelWithCallback(norm, ["cpu", "cpu"])(torch.cat(chunks))
    torch.testing.assert_close(y[2:].mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(norm.running_mean, 0.1 * chunks[0].mean((0, 2, 3)))
    assert norm.num_batches_tracked == 1


def test_only_the_output_is_saved():
    norm, x, saved = make_norm("leaky_relu"), randn(requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = norm(x * 1)
    maps = {t.untyped_storage().data_ptr() for t in saved if t.numel() == y.numel()}
    assert maps - {x.untyped_storage().data_ptr()} == {y.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (1e-3, 0.5), (0.0, 0.5)])
def test_16_bit_gradients_are_close_to_float32(dtype, scale, bias):
    """For small scales, the normalized values cannot be recomputed from a 16-bit output."""
    norm = InPlaceABNSync(4)
    nn.init.constant_(norm.weight, scale)
    nn.init.constant_(norm.bias, bias)
    x, shortcut, factor = (torch.randn(8, 4, 9, 9) for _ in range(3))
    expected = output_and_gradients(norm, [x, shortcut], factor)
    actual = output_and_gradients(norm, [x.to(dtype), shortcut.to(dtype)], factor)
    assert actual[0].dtype == dtype
    for a, b in zip(actual, expected, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm() + 1e-3
    assert actual[-2].abs().min() > 0  # even a weight of zero has a nonzero gradient


def test_single_value_per_channel_can_be_trained():
    values = output_and_gradients(make_norm("leaky_relu"), [randn(1, 4, 1, 1)], 1)
    assert all(torch.isfinite(value).all() for value in values)


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="fake CUDA tensors need a CUDA driver before PyTorch 2.9")
@pytest.mark.parametrize("function", [SyncBatchNormFunction, InPlaceABNFunction])
def test_replicas_on_two_gpus_keep_their_devices(function, monkeypatch):
    """Fake tensors replace tensors on two GPUs."""
    monkeypatch.setattr(sync_stats, "_cached_constant", sync_stats._cached_constant.__wrapped__)
    with FakeTensorMode():
        devices = [torch.device("cuda", i) for i in (0, 1)]
        inputs = [torch.randn(2, 4, 5, 6, device=d) for d in devices]
        parameters = [torch.ones(4, device=d) for d in (*devices, *devices)]
        ctx = SimpleNamespace()
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        arguments = (None, *inputs, *parameters)
        if function is InPlaceABNFunction:
            arguments = (None, 0.01, *inputs, None, None, *parameters)
        outputs = function.forward(ctx, SyncStatistics(1e-5, local=True), *arguments)
        gradients = function.backward(ctx, *(torch.ones_like(y) for y in outputs))
        assert [y.device for y in outputs] == devices
        assert [g.device for g in gradients if g is not None] == devices * 3


def test_weights_of_in_place_norms_and_batch_norms_are_distinguished(tmp_path, caplog):
    """In-place norms and batch norms have equal state-dict keys, but different outputs."""
    inplace, plain = (nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[kind](4)) for kind in ("inplace", "sync"))
    for name, module in (("inplace", inplace), ("plain", plain)):
        torch.save(module.state_dict(), tmp_path / f"{name}.pth")
        load_weights(module, tmp_path / f"{name}.pth")
    assert "leaky ReLU" not in caplog.text
    with pytest.raises(WeightsError, match=r"MODEL\.norm inplace"):
        load_weights(plain, tmp_path / "inplace.pth")
    load_weights(inplace, tmp_path / "plain.pth")
    assert "leaky ReLU" in caplog.text


def test_in_place_norms_cannot_be_converted():
    with pytest.raises(ValueError, match=r"InPlaceABN.*MODEL\.norm sync"):
        to_batchnorm(nn.Sequential(make_norm("leaky_relu")))


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"slope": 0}])
def test_activations_that_are_not_invertible_are_rejected(options):
    with pytest.raises(ValueError, match=r"leaky_relu.* slope > 0"):
        InPlaceABNSync(4, **options)
