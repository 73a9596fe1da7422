"""Synchronized batch norm over replicas and ranks, compared with `nn.BatchNorm*d` on the whole batch."""

import copy
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cuda_kernels import CountOperators, use_cuda_kernels
from golden import golden
from ranks import on_ranks
from torch import nn

from mit_semseg.engine import build_loss
from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    ReplicaError,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    UserScatteredDataParallel,
    convert_sync_batchnorm,
    sync_stats,
    to_batchnorm,
)
from mit_semseg.models import ModelBuilder, SegmentationModule

SYNCHRONIZED = SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d


def norm_pair(dimensions=2, channels=3, *, eps=1e-14, clamp_variance=True, **options):
    """Return a synchronized and a plain batch norm in float64 with equal parameters.

    The default eps is so small that the divisors sqrt(max(var, eps)) and sqrt(var + eps) are equal.
    """
    plain = getattr(nn, f"BatchNorm{dimensions}d")(channels, eps, **options).double()
    kind = SYNCHRONIZED[dimensions - 1]
    synchronized = kind(channels, eps, clamp_variance=clamp_variance, **options).double()
    if plain.affine:
        nn.init.uniform_(plain.weight, 0.5, 1.5)
        nn.init.normal_(plain.bias)
    synchronized.load_state_dict(plain.state_dict())
    return synchronized, plain


def outputs_and_gradients(norm, chunks, factors):
    """Return the outputs, and the gradients of sum(output * factor); a plain norm gets one concatenated batch."""
    norm.zero_grad()
    chunks = [c.detach().clone(memory_format=torch.preserve_format).requires_grad_() for c in chunks]
    if isinstance(norm, SYNCHRONIZED):
        outputs = UserScatteredDataParallel(norm, ["cpu"] * len(chunks), timeout=20)(chunks)
    else:
        outputs = norm(torch.cat(chunks))
    (outputs * torch.cat(factors)).sum().backward()
    return [outputs.detach(), torch.cat([c.grad for c in chunks]), *(p.grad.clone() for p in norm.parameters())]


def assert_equal_training(synchronized, plain, sizes, shape, mean=0.0, std=1.0, steps=2, order=torch.contiguous_format):
    """Compare the outputs, gradients and buffers of two norms; `sizes` are the batch sizes of the replicas."""
    for step in range(steps):
        torch.manual_seed(step)
        x = [torch.randn(n, plain.num_features, *shape, dtype=torch.float64) * std + mean for n in sizes]
        chunks = [chunk.to(memory_format=order) for chunk in x]
        factors = [torch.randn_like(chunk) for chunk in chunks]
        results = (outputs_and_gradients(norm, chunks, factors) for norm in (synchronized, plain))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
        for name, buffer in synchronized.state_dict().items():
            torch.testing.assert_close(buffer, plain.state_dict()[name], rtol=1e-6, atol=1e-12)


@pytest.fixture(params=["portable", "CUDA kernels"])
def kernels(request, monkeypatch):
    if request.param == "CUDA kernels":
        use_cuda_kernels(monkeypatch)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (3, 1e-4)])
@pytest.mark.parametrize("sizes", [(2, 2), (4, 1, 2)])
@pytest.mark.parametrize("options", [{}, {"clamp_variance": False, "eps": 1e-5}], ids=["clamped", "added"])
def test_replicas_equal_whole_batch(sizes, mean, std, options):
    assert_equal_training(*norm_pair(**options), sizes, (5, 4), mean, std)


OPTIONS = [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3}]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dimensions", "shape"), [(1, ()), (1, (7,)), (2, (1, 1)), (2, (5, 3)), (3, (2, 3, 2))])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_dimension_and_option_equals_pytorch(dimensions, shape, options):
    assert_equal_training(*norm_pair(dimensions, **options), (2, 3), shape, mean=2, steps=3)


@pytest.mark.usefixtures("kernels")
def test_channels_last_is_preserved():
    synchronized, plain = norm_pair()
    assert_equal_training(synchronized, plain, (2, 2), (5, 4), order=torch.channels_last)
    x = torch.randn(4, 3, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    output = DataParallelWithCallback(synchronized, ["cpu", "cpu"])(x)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_have_float32_statistics(dtype):
    """With mean 60 and standard deviation 1, statistics computed in 16 bits would have no correct digit."""
    synchronized, plain = norm_pair(eps=1e-5)
    synchronized.float()
    chunks = [(torch.randn(4, 3, 16, 16) + 60).to(dtype) for _ in range(2)]
    factors = [torch.randn(4, 3, 16, 16) for _ in chunks]
    actual = outputs_and_gradients(synchronized, chunks, factors)
    expected = outputs_and_gradients(plain, [c.double() for c in chunks], [f.double() for f in factors])
    assert actual[0].dtype == actual[1].dtype == dtype
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * torch.finfo(dtype).eps * float(b.abs().max()))
    for name in ("running_mean", "running_var"):
        assert getattr(synchronized, name).dtype == torch.float32
        torch.testing.assert_close(getattr(synchronized, name).double(), getattr(plain, name), rtol=1e-5, atol=0)


def test_replicas_inherit_autocast_and_gradient_mode():
    dtypes = []
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SynchronizedBatchNorm2d(4))
    net.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    parallel = DataParallelWithCallback(net, ["cpu", "cpu"])
    with torch.autocast("cpu", torch.bfloat16):
        parallel(torch.randn(4, 3, 8, 8)).float().sum().backward()
    assert dtypes == [torch.bfloat16] * 2
    with torch.no_grad():
        assert not parallel(torch.randn(4, 3, 8, 8)).requires_grad


def test_variance_is_as_accurate_as_in_pytorch_and_not_negative_for_large_means():
    """The first channel is constant, and float32 cannot represent its value exactly."""
    x = torch.full((8, 2, 16, 16), 7e4 + 1 / 3, dtype=torch.float64)
    x[:, 1] += torch.randn(8, 16, 16)
    norm, plain = SynchronizedBatchNorm2d(2, clamp_variance=False), nn.BatchNorm2d(2)
    outputs = [net(x.float()).detach().double() for net in (DataParallelWithCallback(norm, ["cpu", "cpu"]), plain)]
    error, error_of_pytorch = ((y[:, 1] - (x[:, 1] - x[:, 1].mean()) / x[:, 1].std()).abs().max() for y in outputs)
    assert error < 2 * error_of_pytorch
    variance = x.float().double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", golden("golden_syncbn")["cases"], ids=lambda c: c["name"])
def test_golden_vectors(case):
    """Outputs and gradients equal those of the original layer; running statistics equal those of `nn.BatchNorm2d`."""
    dtype = {"torch.float64": torch.float64, "torch.float32": torch.float32}[case["dtype"]]
    shape, rng = case["shape"], np.random.default_rng(11)
    norm = SynchronizedBatchNorm2d(shape[1], eps=case["eps"], momentum=case["momentum"])
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, shape[1])))
        norm.bias.copy_(torch.from_numpy(rng.normal(0, 0.1, shape[1])))
    norm.to(dtype)
    scale, shift = (np.array(case[name]).reshape(1, -1, 1, 1) for name in ("scale", "shift"))
    # For large means, cancellation makes float32 results of the original layer wrong, so these are not compared.
    cancelled = case["name"].startswith("big_mean")
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for number, step in enumerate(case["steps"]):
        rng = np.random.default_rng(100 + number)
        x = torch.from_numpy(rng.standard_normal(shape) * scale + shift).to(dtype)
        factor = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        actual = outputs_and_gradients(norm, x.split(case["chunks"]), factor.split(case["chunks"]))
        for value, name in zip(actual, ("out", "grad_x", "grad_w", "grad_b"), strict=True):
            if step[name] is not None and not (cancelled and name != "grad_b"):
                torch.testing.assert_close(value.flatten(), torch.tensor(step[name], dtype=dtype), **tolerance)
        for name in ("running_mean", "running_var"):
            expected = torch.tensor(step[f"bn_{name}"], dtype=dtype)
            torch.testing.assert_close(getattr(norm, name), expected, rtol=1e-4 if cancelled else 1e-5, atol=1e-6)


def test_empty_batch_does_not_change_running_statistics():
    synchronized, plain = norm_pair()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    output = UserScatteredDataParallel(synchronized, ["cpu", "cpu"])([x, x[:0]])
    torch.testing.assert_close(output, plain(x))
    torch.testing.assert_close(synchronized.running_var, plain.running_var)


def test_single_device_and_eval_mode_equal_pytorch_bit_for_bit():
    norm, plain = SynchronizedBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 6, 5)
    assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm.running_var, plain.running_var)
    assert torch.equal(DataParallelWithCallback(norm, ["cpu"])(x), plain(x))
    norm.eval(), plain.eval()
    assert torch.equal(DataParallelWithCallback(norm, ["cpu", "cpu"])(x), plain(x))


def pooled_norm(channels=5) -> SynchronizedBatchNorm2d:
    """Return a norm after global pooling, in float64, with running statistics of earlier steps."""
    torch.manual_seed(0)
    norm = SynchronizedBatchNorm2d(channels, clamp_variance=False).double()
    norm.after_global_pooling = True
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def pooled_batch(images):
    torch.manual_seed(1)
    return torch.randn(images, 5, 1, 1, dtype=torch.float64) * 2 + 1, torch.randn(images, 5, 1, 1, dtype=torch.float64)


def train_pooled(norm, x, factor):
    """Return output, gradients and running statistics of a training step."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * factor).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def expected_pooled(images):
    """Compute the results of `train_pooled` by the definition."""
    norm, (x, factor) = pooled_norm(), pooled_batch(images)
    if images == 1:
        mean, variance = x.flatten(), (x.flatten() - norm.running_mean) ** 2
    else:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
    mean = 0.9 * norm.running_mean + 0.1 * mean
    variance = 0.9 * norm.running_var + 0.1 * variance
    std = (variance + norm.eps).sqrt()[:, None, None]
    normalized = (x - mean[:, None, None]) / std
    weight, bias = (p.detach()[:, None, None] for p in (norm.weight, norm.bias))
    sums = (factor * normalized).sum((0, 2, 3)), factor.sum((0, 2, 3))
    return [normalized * weight + bias, factor * weight / std, *sums, mean, variance]


def assert_all_close(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("images", [1, 2, 15])
def test_few_images_after_global_pooling_are_normalized_by_running_statistics(images):
    assert_all_close(train_pooled(pooled_norm(), *pooled_batch(images)), expected_pooled(images))


def test_16_images_after_global_pooling_are_normalized_by_their_statistics():
    plain, (x, factor) = nn.BatchNorm2d(5).double(), pooled_batch(16)
    plain.load_state_dict(pooled_norm().state_dict())
    assert_all_close(train_pooled(pooled_norm(), x, factor), train_pooled(plain, x, factor))


def test_replicas_share_running_statistics_after_global_pooling():
    norm, (x, factor) = pooled_norm(), pooled_batch(5)
    parallel = UserScatteredDataParallel(norm, ["cpu", "cpu"], timeout=20)
    chunks = [chunk.requires_grad_() for chunk in x.split([3, 2])]
    y = parallel(chunks)
    (y * factor).sum().backward()
    gradient = torch.cat([chunk.grad for chunk in chunks])
    results = [y.detach(), gradient, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    assert_all_close(results, expected_pooled(5))


def test_replicas_with_one_image_each_share_running_statistics_after_global_pooling():
    norm, (x, _) = pooled_norm(), pooled_batch(2)
    UserScatteredDataParallel(norm, ["cpu", "cpu"], timeout=20)(list(x.split(1)))
    *_, mean, variance = expected_pooled(2)
    assert_all_close([norm.running_mean, norm.running_var], [mean, variance])


def _train_pooled_on_rank(rank):
    torch.manual_seed(0)
    x, factor = (t[3 * rank : 3 * rank + 3] for t in pooled_batch(6))
    return [t.numpy() for t in train_pooled(pooled_norm(), x, factor)]


def test_ranks_share_running_statistics_after_global_pooling(tmp_path):
    first, second = on_ranks(2, tmp_path, _train_pooled_on_rank)
    *per_image, weight, bias, mean, variance = expected_pooled(6)
    for index, expected in enumerate(per_image):
        np.testing.assert_allclose(np.concatenate([first[index], second[index]]), expected)
    for index, expected in enumerate((weight, bias), start=2):  # DDP adds the gradients of the ranks
        np.testing.assert_allclose(first[index] + second[index], expected)
    for rank in (first, second):
        for index, expected in enumerate((mean, variance), start=4):
            np.testing.assert_allclose(rank[index], expected)


def test_conversion_is_reversible():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Sequential(nn.BatchNorm2d(4)))
    original = copy.deepcopy(net)
    assert convert_sync_batchnorm(net) is net
    assert type(net[1]) is type(net[2][0]) is SynchronizedBatchNorm2d
    x = torch.randn(4, 3, 6, 5)
    DataParallelWithCallback(net, ["cpu", "cpu"])(x)
    assert to_batchnorm(net) is net
    assert type(net[1]) is type(net[2][0]) is nn.BatchNorm2d
    assert vars(net[1]).keys() == vars(original[1]).keys()
    original(x)
    torch.testing.assert_close(net[1].running_mean, original[1].running_mean)


class FaultyReplica(nn.Module):
    """A module in which replica 1 raises an error, or sleeps before or after the second norm."""

    def __init__(self, fault):
        super().__init__()
        self.first, self.second = SynchronizedBatchNorm2d(3), SynchronizedBatchNorm2d(3)
        self.fault = fault

    def forward(self, x):
        fault = self.fault if self.first.replica_index == 1 else ""
        x = self.first(x)
        if fault == "raises":
            raise KeyError("no such key")
        time.sleep(3 if fault == "sleeps before" else 0)
        x = self.second(x)
        time.sleep(3 if fault == "sleeps after" else 0)
        return x


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("raises", KeyError, "no such key"),
        ("sleeps before", ReplicaError, r"^second: replica [02] of 3 .* replica 1 .*0\.5 s"),
        ("sleeps after", ReplicaError, r"^replica 1 .*0\.5 s"),
    ],
)
def test_failed_replica_stops_the_others(fault, error, message):
    net = DataParallelWithCallback(FaultyReplica(fault), ["cpu"] * 3, timeout=0.5)
    start = time.perf_counter()
    with pytest.raises(error, match=message):
        net(torch.randn(6, 3, 4, 4))
    assert time.perf_counter() - start < 2
    for thread in threading.enumerate():
        if thread.name.startswith("replica"):
            thread.join(5)
            assert not thread.is_alive()


def _pair_and_chunks(count, shift, options):
    """Return two norm layers, a list of inputs and a list of factors for the outputs, equal on every rank."""
    torch.manual_seed(0)
    pair = norm_pair(**options)
    chunks = [torch.randn(2 + i, 3, 4, 5, dtype=torch.float64) + shift for i in range(count)]
    return *pair, chunks, [torch.randn_like(chunk) for chunk in chunks]


def _train_on_rank(rank, world_size, replicas, shift, options, cuda_kernels):
    if cuda_kernels:
        use_cuda_kernels()
    norm, _, chunks, factors = _pair_and_chunks(world_size * replicas, shift, options)
    own = slice(rank * replicas, (rank + 1) * replicas)
    values = outputs_and_gradients(norm, chunks[own], factors[own])
    return [v.numpy() for v in values], {name: v.numpy() for name, v in norm.state_dict().items()}


@pytest.mark.parametrize(
    ("world_size", "replicas", "shift", "options", "cuda_kernels"),
    [
        (2, 1, 1e4, {"momentum": None}, False),
        (3, 1, 1.0, {"affine": False}, False),
        (2, 2, 3.0, {}, False),
        (2, 1, 1e4, {"clamp_variance": False, "eps": 1e-5}, True),
    ],
)
def test_ranks_equal_whole_batch(tmp_path, world_size, replicas, shift, options, cuda_kernels):
    ranks = on_ranks(world_size, tmp_path, _train_on_rank, world_size, replicas, shift, options, cuda_kernels)
    _, plain, chunks, factors = _pair_and_chunks(world_size * replicas, shift, options)
    expected = outputs_and_gradients(plain, chunks, factors)
    outputs, inputs, *parameters = zip(*(values for values, _ in ranks), strict=True)
    actual = [np.concatenate(outputs), np.concatenate(inputs), *(sum(grads) for grads in parameters)]
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    for _, state in ranks:
        for name, value in plain.state_dict().items():
            np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-6)
            assert np.array_equal(state[name], ranks[0][1][name])  # bit-identical on all ranks


def _count_operators(rank, cuda_kernels):
    if cuda_kernels:
        use_cuda_kernels()
    norm, x = SynchronizedBatchNorm2d(3, clamp_variance=False), torch.randn(2, 3, 4, 5, requires_grad=True)
    for _ in range(2):  # the first call also creates constants
        with CountOperators() as operators:
            torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), torch.ones(2, 3, 4, 5))
    return operators.counts


@pytest.mark.parametrize(("cuda_kernels", "limit"), [(False, 25), (True, 11)])
def test_number_of_operators(tmp_path, cuda_kernels, limit):
    counts, _ = on_ranks(2, tmp_path, _count_operators, cuda_kernels)
    assert counts.total() - counts["ones"] <= limit, counts


@pytest.mark.parametrize("replicas", [2, 4])
def test_number_of_operators_of_replicas(kernels, request, replicas):
    """Four CUDA kernels per replica, and six operators that merge the statistics."""
    norm = SynchronizedBatchNorm2d(3, clamp_variance=False)
    arguments = [(torch.randn(2, 3, 4, 5, requires_grad=True), norm.weight, norm.bias) for _ in range(replicas)]
    for _ in range(2):
        with CountOperators() as operators:
            outputs = norm._normalize_replicas(arguments)
            torch.autograd.grad(outputs, [x for x, _, _ in arguments], [torch.ones(2, 3, 4, 5) for _ in outputs])
    counts = operators.counts
    expected = 4 * replicas + 6 if "CUDA" in request.node.name else 11 * replicas + 17
    assert counts.total() - counts["ones"] <= expected, counts


@pytest.mark.long
@pytest.mark.parametrize(
    ("encoder", "decoder", "limit"), [("resnet50dilated", "ppm_deepsup", 1100), ("hrnetv2", "c1", 5000)]
)
def test_number_of_operators_of_a_step_on_eight_gpus(monkeypatch, encoder, decoder, limit):
    """A synchronized norm has at most eight operators more than a local one; collectives are replaced by copies."""
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, build_loss(), 0.4).to(memory_format=torch.channels_last)
    norms = sum(isinstance(part, SynchronizedBatchNorm2d) for part in module.modules())
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    feed = {"img_data": images, "seg_label": torch.randint(-1, 150, (2, 8, 8))}

    def count():
        for _ in range(2):
            module.zero_grad()
            with CountOperators() as operators:
                module(feed)[0].backward()
        return operators.counts.total()

    local = count()
    use_cuda_kernels(monkeypatch)
    monkeypatch.setattr(SynchronizedBatchNorm2d, "_syncs_ranks", lambda self: self.training)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(8))
    monkeypatch.setattr(sync_stats, "all_gather", lambda out, x: out.copy_(x.expand_as(out)))
    synchronized = count()
    assert synchronized <= min(limit, local + 8 * norms)


def _forward_on_rank_0(rank):
    return time.sleep(4) if rank else str(SynchronizedBatchNorm2d(3)(torch.randn(2, 3, 4, 4)))


def test_timeout_of_a_rank_names_the_layer(tmp_path):
    error, _ = on_ranks(2, tmp_path, _forward_on_rank_0, timeout=1)
    assert "ProcessGroupError: SynchronizedBatchNorm2d(3): " in error
    assert "rank 0 of 2" in error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited"), True),
    ],
)
def test_only_communication_errors_are_attributed_to_other_ranks(error, expected):
    assert sync_stats.is_communication_error(error) == expected
