"""In-place activated batch norm against batch norm and activation one after the other."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mit_semseg.lib.nn import (
    InPlaceABN,
    InPlaceABNSync,
    UserScatteredDataParallel,
    convert_sync_batchnorm,
    sync_stats,
    to_batchnorm,
)
from mit_semseg.lib.nn.inplace_abn import ACTIVATIONS, Activation, NormalizeInPlace
from mit_semseg.lib.nn.sync_stats import Normalize, SyncStatistics
from mit_semseg.models.layers import NORMS
from mit_semseg.models.weight_files import WeightsError
from mit_semseg.models.weights import load_weights

SHAPE = (3, 4, 5, 6)


class Reference(nn.Module):
    """Plain batch norm with the scale |weight| + eps, then shortcut and activation."""

    def __init__(self, norm: InPlaceABN):
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features, affine=norm.affine).to(norm.running_mean.dtype)
        self.norm.load_state_dict(norm.state_dict())
        self.activation, self.slope = norm.activation, norm.slope

    def forward(self, x, shortcut=None):
        norm = self.norm
        weight = norm.weight.abs() + norm.eps if norm.affine else None
        y = F.batch_norm(x, norm.running_mean, norm.running_var, weight, norm.bias, self.training, 0.1, norm.eps)
        y = y if shortcut is None else y + shortcut
        if self.activation == "leaky_relu":
            return F.leaky_relu(y, self.slope)
        return F.elu(y, self.slope) if self.activation == "elu" else y


def norm_of(activation, kind=InPlaceABN, **options):
    torch.manual_seed(0)
    norm = kind(SHAPE[1], activation=activation, **options).double()
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm


def gradients(module, tensors, factor):
    """Output, then gradients of all inputs and parameters of sum(output * factor)."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    module.zero_grad()
    y = module(*tensors)
    (y * factor).sum().backward()
    return [y.detach(), *(t.grad for t in tensors), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("block", [2**20, 100])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_batch_norm_then_activation(activation, affine, with_shortcut, block, monkeypatch):
    monkeypatch.setattr(sync_stats, "BLOCK", block)
    norm = norm_of(activation, affine=affine)
    reference = Reference(norm)
    tensors = [torch.randn(SHAPE, dtype=torch.float64) * 2 + 5]
    tensors += [torch.randn(SHAPE, dtype=torch.float64)] if with_shortcut else []
    factor = torch.randn(SHAPE, dtype=torch.float64)
    for ours, theirs in zip(gradients(norm, tensors, factor), gradients(reference, tensors, factor), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), getattr(reference.norm, name), rtol=1e-10, atol=1e-12)
    norm.eval()
    reference.eval()
    torch.testing.assert_close(norm(*tensors), reference(*tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_passes_the_numerical_check_of_its_gradient(activation):
    norm = norm_of(activation)
    x, shortcut = (torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, shortcut, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, shortcut))

    inputs = (x, shortcut, norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_replicas_share_statistics(activation):
    norm = norm_of(activation, InPlaceABNSync)
    reference = Reference(norm)
    chunks = [torch.randn(n, *SHAPE[1:], dtype=torch.float64) for n in (1, 2)]
    factor = torch.randn(SHAPE, dtype=torch.float64)
    parallel = UserScatteredDataParallel(norm, ["cpu", "cpu"], timeout=20)
    given = [c.clone().requires_grad_() for c in chunks]
    y = parallel(given)
    (y * factor).sum().backward()
    expected = gradients(reference, [torch.cat(chunks)], factor)
    ours = [y, torch.cat([c.grad for c in given]), norm.weight.grad, norm.bias.grad]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def _unsynchronized_process(rank, activation):
    from mit_semseg.engine.distributed import Place, Processes, share_buffers

    torch.manual_seed(rank)
    norms = norm_of(activation), NORMS["batch"](4).double()
    for norm in norms:
        norm(torch.randn(SHAPE, dtype=torch.float64) + 10 * rank)
    before = norms[1].running_mean.tolist()
    share_buffers(nn.ModuleList(norms), Processes(Place(rank, 2)))
    return before, [norm.running_mean.tolist() for norm in norms]


def test_processes_without_sync_agree_when_asked_to(tmp_path):
    (first, shared), (second, taken) = in_processes(2, tmp_path, _unsynchronized_process, "leaky_relu")
    assert abs(first[0] - second[0]) > 0.5  # every process has learnt its own
    assert shared == taken
    assert shared[1] == first


def _synchronized_process(rank, activation):
    norm = norm_of(activation, InPlaceABNSync)
    chunk, factor = (t.chunk(2)[rank] for t in _whole())
    values = gradients(norm, [chunk], factor)
    return [v.tolist() for v in (*values[:2], norm.running_var)]


def _whole():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, *SHAPE[1:], dtype=torch.float64, generator=generator) for _ in range(2)]


def test_processes_share_statistics(tmp_path):
    norm = norm_of("elu")
    x, factor = _whole()
    expected = gradients(Reference(norm), [x], factor)
    halves = in_processes(2, tmp_path, _synchronized_process, "elu")
    for i in range(2):
        ours = torch.cat([torch.tensor(half[i], dtype=torch.float64) for half in halves])
        torch.testing.assert_close(ours, expected[i], rtol=1e-8, atol=1e-8)
    assert halves[0][2] == halves[1][2]


def test_without_sync_replicas_have_their_own_statistics():
    norm = norm_of("none", affine=False)
    chunks = [torch.randn(2, *SHAPE[1:], dtype=torch.float64) + shift for shift in (0, 10)]
    y = UserScatteredDataParallel(norm, ["cpu", "cpu"], timeout=20)(chunks)
    torch.testing.assert_close(y[2:].mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(norm.running_mean, 0.1 * chunks[0].mean((0, 2, 3)))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeps_its_output_only(activation):
    """The input is free again after the forward pass, and the output is kept once."""
    norm = norm_of(activation)
    kept = []
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x * 1)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() == y.numel()}
    assert large - {x.untyped_storage().data_ptr()} == {y.untyped_storage().data_ptr()}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (1e-3, 0.5), (0.0, 0.5)])
def test_low_precision_has_the_gradients_of_float32(kind, scale, bias):
    """Also where nothing could be recovered from a 16-bit output: scales near zero beside a bias and a shortcut."""
    torch.manual_seed(0)
    norm = InPlaceABNSync(4)
    nn.init.constant_(norm.weight, scale)
    nn.init.constant_(norm.bias, bias)
    tensors = [torch.randn(8, 4, 9, 9), torch.randn(8, 4, 9, 9)]
    factor = torch.randn(8, 4, 9, 9)
    expected = gradients(norm, tensors, factor)
    ours = gradients(norm, [t.to(kind) for t in tensors], factor)
    assert ours[0].dtype == kind
    for mine, exact in zip(ours, expected, strict=True):
        assert (mine.float() - exact).norm() <= 0.03 * exact.norm() + 1e-3


def test_float32():
    x = torch.randn(SHAPE, requires_grad=True)
    reference = Reference(norm_of("leaky_relu")).float()
    y, expected = norm_of("leaky_relu").float()(x), reference(x)
    torch.testing.assert_close(y, expected)


def test_a_zero_scale_still_learns():
    norm = norm_of("leaky_relu")
    nn.init.zeros_(norm.weight)
    values = gradients(norm, [torch.randn(SHAPE, dtype=torch.float64)], torch.randn(SHAPE, dtype=torch.float64))
    assert all(torch.isfinite(v).all() for v in values)
    assert values[-2].abs().min() > 0


def test_saturated_elu_gives_finite_gradients():
    norm = InPlaceABN(1, activation="elu", slope=1.0)
    nn.init.constant_(norm.weight, 100.0)
    for value in gradients(norm, [torch.randn(2, 1, 4, 4)], torch.randn(2, 1, 4, 4)):
        assert torch.isfinite(value).all()


def test_a_single_value_trains():
    norm = InPlaceABNSync(4)
    y = norm(torch.randn(1, 4, 1, 1, requires_grad=True))
    y.sum().backward()
    assert torch.isfinite(y).all()


@pytest.mark.skipif(
    not torch.cuda.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="this PyTorch asks a driver for its devices",
)
@pytest.mark.parametrize("function", [Normalize, NormalizeInPlace])
def test_replicas_on_different_devices(function):
    """Every tensor stays where it belongs; tensors without values stand for two GPUs."""
    with FakeTensorMode():
        devices = [torch.device("cuda", i) for i in (0, 1)]
        inputs = [torch.randn(2, 4, 5, 6, device=d) for d in devices]
        affine = [torch.ones(4, device=d) for d in (*devices, *devices)]
        ctx = SimpleNamespace()
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        options = (Activation(), 2, False) if function is NormalizeInPlace else ()
        outputs = function.forward(ctx, SyncStatistics(1e-5, alone=True), *options, *inputs, *affine)
        gradients = function.backward(ctx, *(torch.ones_like(y) for y in outputs))
        assert [y.device for y in outputs] == devices
        assert [g.device for g in gradients if g is not None] == devices * 3


def test_a_network_of_in_place_norms_is_told_by_its_file(tmp_path, caplog):
    """The keys are the same, the function is not: one is not taken for the other in silence."""
    inplace, plain = (nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[kind](4)) for kind in ("inplace", "sync"))
    for name, module in (("inplace", inplace), ("plain", plain)):
        torch.save(module.state_dict(), tmp_path / f"{name}.pth")
    load_weights(inplace, tmp_path / "inplace.pth")
    load_weights(plain, tmp_path / "plain.pth")
    assert "something else" not in caplog.text
    with pytest.raises(WeightsError, match=r"trained with in-place norms.* set MODEL\.norm inplace"):
        load_weights(plain, tmp_path / "inplace.pth")
    load_weights(inplace, tmp_path / "plain.pth", what="encoder x")
    assert "encoder x computes something else (leaky ReLU for ReLU" in caplog.text


def test_to_plain_batch_norm():
    x = torch.randn(SHAPE, dtype=torch.float64)
    norm = norm_of("none").eval()
    expected = norm(x)
    assert type(to_batchnorm(norm)) is nn.BatchNorm2d
    torch.testing.assert_close(norm(x), expected)
    with pytest.raises(ValueError, match="has its activation in it"):
        to_batchnorm(nn.Sequential(norm_of("elu")))
    unsynchronized = NORMS["batch"](4)
    assert convert_sync_batchnorm(unsynchronized).synchronized


def test_activations_that_cannot_be_inverted_are_refused():
    with pytest.raises(ValueError, match=r"activation 'relu': choose one of leaky_relu, elu, none"):
        partial(InPlaceABNSync, activation="relu")(4)
    with pytest.raises(ValueError, match="above 0"):
        InPlaceABN(4, slope=0)
    assert Activation("identity").name == "none"
