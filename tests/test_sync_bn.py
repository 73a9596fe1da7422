"""Synchronized batch norm over replicas and processes, against PyTorch's own on the whole batch."""

import copy
import threading
import time

import numpy as np
import pytest
import torch
from golden import golden
from processes import in_processes
from torch import nn

from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    ReplicaError,
    ReplicaGroup,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    UserScatteredDataParallel,
    convert_sync_batchnorm,
    sync_stats,
    to_batchnorm,
)

# By default the synchronized path divides by sqrt(max(var, eps)), nn.BatchNorm by sqrt(var + eps): a tiny eps makes
# them one, and so does clamp_variance False.
TINY = 1e-14
PLAIN = {
    SynchronizedBatchNorm1d: nn.BatchNorm1d,
    SynchronizedBatchNorm2d: nn.BatchNorm2d,
    SynchronizedBatchNorm3d: nn.BatchNorm3d,
}


def both(kind=SynchronizedBatchNorm2d, channels=3, **options):
    """A synchronized norm and a plain one with equal parameters, in float64."""
    ours = kind(channels, **{"eps": TINY, **options}).double()
    options.pop("clamp_variance", None)
    plain = PLAIN[kind](channels, **{"eps": TINY, **options}).double()
    if plain.affine:
        nn.init.uniform_(plain.weight, 0.5, 1.5)
        nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def run(norm, chunks, factors):
    """Outputs and every gradient of sum(output * factor) of one norm on chunks of a batch: on CPU replicas, or, for a
    plain norm, on their concatenation."""
    norm.zero_grad()
    chunks = [c.detach().clone(memory_format=torch.preserve_format).requires_grad_() for c in chunks]
    if type(norm) in PLAIN:
        parallel = UserScatteredDataParallel(norm, ["cpu"] * len(chunks), timeout=20)
        outputs = parallel(chunks)
    else:
        outputs = norm(torch.cat(chunks))
    (outputs * torch.cat(factors)).sum().backward()
    return [outputs.detach(), torch.cat([c.grad for c in chunks]), *(p.grad.clone() for p in norm.parameters())]


def assert_same(ours, plain, sizes, make, steps=2):
    for step in range(steps):
        torch.manual_seed(step)
        chunks = [make(n) for n in sizes]
        factors = [torch.randn_like(c) for c in chunks]
        got, expected = run(ours, chunks, factors), run(plain, chunks, factors)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
        for name, buffer in ours.state_dict().items():
            torch.testing.assert_close(buffer, plain.state_dict()[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (3, 1e-4)])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (4, 1, 2), (1, 2, 1, 3)])
def test_replicas_equal_the_whole_batch(sizes, mean, std):
    for options in ({}, {"clamp_variance": False, "eps": 1e-5}):
        ours, plain = both(**options)
        assert_same(ours, plain, sizes, lambda n: torch.randn(n, 3, 5, 4, dtype=torch.float64) * std + mean)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (SynchronizedBatchNorm1d, ()),
        (SynchronizedBatchNorm1d, (7,)),
        (SynchronizedBatchNorm2d, (1, 1)),
        (SynchronizedBatchNorm2d, (5, 3)),
        (SynchronizedBatchNorm3d, (2, 3, 2)),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clamp_variance": False, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.3},
    ],
    ids=lambda o: "-".join(map(str, o)) or "default",
)
def test_every_kind_and_option(kind, shape, options):
    ours, plain = both(kind, **options)
    assert_same(ours, plain, (2, 3), lambda n: torch.randn(n, 3, *shape, dtype=torch.float64) + 2, steps=3)


def test_maps_of_different_sizes():
    """One replica sees 6x5, the other 3x4 maps: the statistics are those of all their pixels."""
    ours, plain = both()
    chunks = [torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(1, 3, 3, 4, dtype=torch.float64) * 3 + 1]
    pixels = torch.cat([c.transpose(0, 1).flatten(1) for c in chunks], dim=1).T.reshape(-1, 3, 1, 1)
    parallel = UserScatteredDataParallel(nn.Sequential(ours, nn.Flatten(1), nn.Flatten(0)), ["cpu", "cpu"])
    outputs = parallel(chunks)
    expected = plain(pixels).flatten(1)
    restored = [outputs[:180].view(2, 3, 30), outputs[180:].view(1, 3, 12)]
    got = torch.cat([r.transpose(0, 1).flatten(1) for r in restored], dim=1).T
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-6, atol=0)


def test_memory_order_is_kept():
    ours, plain = both()

    def make(n):
        return torch.randn(n, 3, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)

    assert_same(ours, plain, (2, 2), make)
    output = DataParallelWithCallback(ours, ["cpu", "cpu"])(make(4))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_statistics(dtype):
    """Inputs around 60 with standard deviation 1: statistics in half precision would be useless."""
    ours, plain = both(eps=1e-5)
    ours.float()
    chunks = [(torch.randn(4, 3, 16, 16) + 60).to(dtype) for _ in range(2)]
    factors = [torch.randn(4, 3, 16, 16) for _ in chunks]
    got = run(ours, chunks, factors)
    expected = run(plain, [c.double() for c in chunks], [f.double() for f in factors])
    assert got[0].dtype == got[1].dtype == dtype
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * torch.finfo(dtype).eps * float(b.abs().max()))
    for name in ("running_mean", "running_var"):
        assert getattr(ours, name).dtype == torch.float32
        torch.testing.assert_close(getattr(ours, name).double(), getattr(plain, name), rtol=1e-5, atol=0)


def test_autocast_reaches_the_replicas():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    net = nn.Sequential(nn.Conv2d(3, 4, 1), SynchronizedBatchNorm2d(4), Watch())
    with torch.autocast("cpu", torch.bfloat16):
        DataParallelWithCallback(net, ["cpu", "cpu"])(torch.randn(4, 3, 8, 8)).float().sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert net[1].running_mean.dtype == torch.float32
    with torch.no_grad():
        assert not DataParallelWithCallback(net, ["cpu", "cpu"])(torch.randn(4, 3, 8, 8)).requires_grad


def test_variance_is_never_negative():
    """Mean 1e4 and no variance at all, in float32."""
    norm = SynchronizedBatchNorm2d(2)
    x = torch.full((4, 2, 9, 9), 1e4 + 1 / 3)
    x[:, 1] += torch.randn(4, 9, 9)
    out = DataParallelWithCallback(norm, ["cpu"] * 3)(x).detach()
    assert torch.isfinite(out).all()
    assert (norm.running_var >= 0).all()
    assert float(norm.running_var[1]) == pytest.approx(0.9 + 0.1 * float(x[:, 1].double().var()), rel=1e-3)
    assert out[:, 1].std() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("case", golden("golden_syncbn")["cases"], ids=lambda c: c["name"])
def test_golden_vectors(case):
    """Outputs and gradients of the original's layer; running estimates of plain batch norm (its own are a mistake)."""
    dtype = {"torch.float64": torch.float64, "torch.float32": torch.float32}[case["dtype"]]
    shape, rng = case["shape"], np.random.default_rng(11)
    norm = SynchronizedBatchNorm2d(shape[1], eps=case["eps"], momentum=case["momentum"])
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, shape[1])))
        norm.bias.copy_(torch.from_numpy(rng.normal(0, 0.1, shape[1])))
    norm.to(dtype)
    scale, shift = (np.array(case[name]).reshape(1, -1, 1, 1) for name in ("scale", "shift"))
    # The float32 vectors of large means show the original's cancellation; there the whole batch is the measure.
    cancelled = case["name"].startswith("big_mean")
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for number, step in enumerate(case["steps"]):
        rng = np.random.default_rng(100 + number)
        x = torch.from_numpy(rng.standard_normal(shape) * scale + shift).to(dtype)
        factor = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        got = run(norm, x.split(case["chunks"]), factor.split(case["chunks"]))
        for value, name in zip(got, ("out", "grad_x", "grad_w", "grad_b"), strict=True):
            if step[name] is not None and not (cancelled and name != "grad_b"):
                torch.testing.assert_close(value.flatten(), torch.tensor(step[name], dtype=dtype), **close)
        for name in ("running_mean", "running_var"):
            expected = torch.tensor(step[f"bn_{name}"], dtype=dtype)
            torch.testing.assert_close(getattr(norm, name), expected, rtol=1e-4 if cancelled else 1e-5, atol=1e-6)
        if cancelled:
            deviation = got[0].double().std(dim=(0, 2, 3), correction=0)
            # float32 cancellation leaves few digits of the deviation: an error of 5 % was measured, with room of ten.
            torch.testing.assert_close(deviation, torch.tensor(step["std_out_bn"]).double(), rtol=0.5, atol=0)


def test_means_and_squares_survive_a_mean_that_float32_cannot_hold():
    x = torch.randn(8, 2, 16, 16, dtype=torch.float64) + 7e4
    norm = SynchronizedBatchNorm2d(2, clamp_variance=False)
    out = DataParallelWithCallback(norm, ["cpu", "cpu"])(x.float()).detach().double()
    assert out.mean((0, 2, 3)).abs().max() < 2e-4
    torch.testing.assert_close(
        norm.running_var.double(), 0.9 + 0.1 * x.float().double().var((0, 2, 3)), rtol=1e-5, atol=0
    )


def test_an_empty_batch_leaves_the_estimates_alone():
    """One replica without pictures counts for nothing; none at all divides by nothing."""
    ours, plain = both()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    out = UserScatteredDataParallel(ours, ["cpu", "cpu"])([x, x[:0]])
    torch.testing.assert_close(out, plain(x))
    torch.testing.assert_close(ours.running_var, plain.running_var)
    assert UserScatteredDataParallel(ours, ["cpu", "cpu"])([x[:0], x[:0]]).shape == (0, 3, 4, 4)
    assert torch.isfinite(ours.running_var).all()


def test_blocks_do_not_change_the_result(monkeypatch):

    ours, plain = both(channels=7)
    monkeypatch.setattr(sync_stats, "BLOCK", 40)
    assert_same(ours, plain, (2, 3), lambda n: torch.randn(n, 7, 5, 4, dtype=torch.float64))


def test_a_wrong_number_of_channels_names_the_layer():
    net = nn.Sequential(nn.Identity(), SynchronizedBatchNorm2d(4))
    with pytest.raises(ValueError, match=r"1 takes 4 channels, not \(2, 3, 5, 5\)"):
        DataParallelWithCallback(net, ["cpu", "cpu"])(torch.randn(4, 3, 5, 5))


def test_nothing_to_synchronize_is_pytorchs_kernel():
    norm, plain = SynchronizedBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 6, 5)
    assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm.running_var, plain.running_var)
    assert torch.equal(DataParallelWithCallback(norm, ["cpu"])(x), plain(x))
    norm.eval(), plain.eval()
    assert torch.equal(DataParallelWithCallback(norm, ["cpu", "cpu"])(x), plain(x))


def test_conversion_and_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Sequential(nn.BatchNorm2d(4)))
    net[1].weight.requires_grad_(False)
    original, state = copy.deepcopy(net), net.state_dict()
    converted = convert_sync_batchnorm(net)
    assert converted is net
    assert [type(m) for m in (net[1], net[2][0])] == [SynchronizedBatchNorm2d] * 2
    assert net[1].momentum == 0.3
    assert not net[1].clamp_variance
    assert not net[1].weight.requires_grad
    assert all(torch.equal(net.state_dict()[key], state[key]) for key in state)
    x = torch.randn(4, 3, 6, 5)
    DataParallelWithCallback(net, ["cpu", "cpu"])(x)
    back = to_batchnorm(net)
    assert [type(m) for m in (back[1], back[2][0])] == [nn.BatchNorm2d] * 2
    assert vars(back[1]).keys() == vars(original[1]).keys()
    original(x)
    torch.testing.assert_close(back[1].running_mean, original[1].running_mean)
    assert type(convert_sync_batchnorm(nn.BatchNorm1d(3))) is SynchronizedBatchNorm1d
    assert type(to_batchnorm(SynchronizedBatchNorm3d(3))) is nn.BatchNorm3d


# What goes wrong


class Late(nn.Module):
    """Behaves in replica 1 only: waits, fails, or takes another way."""

    def __init__(self, how):
        super().__init__()
        self.norm, self.other, self.how, self.rank = SynchronizedBatchNorm2d(3), SynchronizedBatchNorm2d(3), how, 0

    def __data_parallel_replicate__(self, context, copy_id):
        self.rank = copy_id

    def forward(self, x):
        x = self.norm(x)
        if self.rank == 1 and self.how == "fails":
            raise KeyError("no such thing")
        if self.rank == 1 and self.how == "hangs":
            time.sleep(3)
        x = self.norm(x) if self.rank == 1 and self.how == "strays" else self.other(x)
        if self.rank == 1 and self.how == "dawdles":
            time.sleep(3)
        return x


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("fails", KeyError, "no such thing"),
        (
            "hangs",
            ReplicaError,
            r"other: replica [02] of 3 waited for the others, but replica 1 did not arrive within 0\.5 s",
        ),
        ("dawdles", ReplicaError, r"replica 1 did not finish within 0\.5 s of the others"),
        ("strays", RuntimeError, "different ways .* replica 0 at other, replica 1 at norm"),
    ],
)
def test_a_replica_in_trouble_ends_the_others(how, error, message):
    net = DataParallelWithCallback(Late(how), ["cpu"] * 3, timeout=0.5)
    start = time.perf_counter()
    with pytest.raises(error, match=message) as caught:
        net(torch.randn(6, 3, 4, 4))
    assert time.perf_counter() - start < 2
    if how == "fails":
        assert any(entry.name == "forward" and entry.path.name == "test_sync_bn.py" for entry in caught.traceback)
    limit = time.perf_counter() + 5
    while any(t.name.startswith("replica") for t in threading.enumerate()):
        assert time.perf_counter() < limit, "a replica is still waiting"
        time.sleep(0.05)


def test_a_failing_meeting_wakes_everybody():
    group, errors = ReplicaGroup(2, timeout=20), {}

    def broken(values):
        raise ValueError("cannot merge")

    def work(rank):
        try:
            group.together(rank, "layer", rank, broken)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=5)
    assert isinstance(errors[0], ValueError)
    assert isinstance(errors[1], ReplicaError)


# Processes


def _chunk(rank, step, shift):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(2 + rank, 3, 4, 5, dtype=torch.float64, generator=generator) + shift
    return x, torch.randn(x.shape, dtype=torch.float64, generator=generator)


def _synchronized_process(rank, replicas, shift, options):
    torch.manual_seed(0)
    norm, _ = both(**options)
    results = []
    for step in range(2):
        norm.zero_grad()
        pairs = [_chunk(rank * replicas + i, step, shift) for i in range(replicas)]
        inputs = [x.requires_grad_() for x, _ in pairs]
        runner = UserScatteredDataParallel(norm, ["cpu"] * replicas)
        outputs = runner(inputs)
        (outputs * torch.cat([f for _, f in pairs])).sum().backward()
        grads = [p.grad.numpy().copy() for p in norm.parameters()]
        results.append((outputs.detach().numpy(), torch.cat([x.grad for x in inputs]).numpy(), *grads))
    return results, {name: value.numpy() for name, value in norm.state_dict().items()}


@pytest.mark.parametrize(
    ("processes", "replicas", "shift", "options"),
    [(2, 1, 0.0, {}), (2, 1, 1e4, {"momentum": None}), (3, 1, 1.0, {"affine": False}), (2, 2, 3.0, {})],
)
def test_processes_equal_the_whole_batch(tmp_path, processes, replicas, shift, options):
    shares = in_processes(processes, tmp_path, _synchronized_process, replicas, shift, options)
    assert not [share for share in shares if isinstance(share, str)], shares
    torch.manual_seed(0)
    _, plain = both(**options)
    for step in range(2):
        chunks = [_chunk(i, step, shift) for i in range(processes * replicas)]
        expected = run(plain, [x for x, _ in chunks], [f for _, f in chunks])
        outputs, inputs, *parameters = zip(*(results[step] for results, _ in shares), strict=True)
        got = [np.concatenate(outputs), np.concatenate(inputs), *(sum(grads) for grads in parameters)]
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    for _, state in shares:
        for name, value in plain.state_dict().items():
            np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-6)
            assert np.array_equal(state[name], shares[0][1][name])  # bit for bit the same everywhere


def _one_never_comes(rank):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), SynchronizedBatchNorm2d(3))
    if rank == 1:
        time.sleep(4)
        return "slept"
    return str(net(torch.randn(2, 3, 4, 4)))


def test_a_process_that_never_comes_is_reported(tmp_path):
    waited, slept = in_processes(2, tmp_path, _one_never_comes, timeout=1)
    assert slept == "slept"
    assert (
        "ProcessGroupError: SynchronizedBatchNorm2d(3): process 0 of 2 waited for the others, but one ended" in waited
    )
