"""Scattering and gathering of nested inputs, and replicas on the CPU."""

import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch
from ranks import ENV
from scenes import tiny_module
from torch import nn

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    DictGatherDataParallel,
    SynchronizedBatchNorm2d,
    UserScatteredDataParallel,
    patch_replication_callback,
)
from mit_semseg.lib.nn.scatter import gather, scatter

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_gather_inverts_scatter(count):
    tensor = torch.arange(10.0).view(5, 2)
    for obj in (tensor, {"a": tensor, "b": [tensor + 1, (tensor, "text", None, 3)]}, Pair(tensor, [tensor])):
        parts = scatter(obj, [CPU] * count)
        assert len(parts) == len(torch.ones(5).chunk(count))  # of six devices, one gets no row
        assert all(type(part) is type(obj) for part in parts)
        assert repr(gather(parts, CPU)) == repr(obj)


def test_scatter_rejects_different_numbers_of_chunks():
    with pytest.raises(ValueError, match=r"\[1, 2\].* dimension 0"):
        scatter({"a": torch.ones(4), "b": torch.ones(1)}, [CPU, CPU])


def test_positional_and_keyword_tensors_are_scattered():
    class Echo(nn.Module):
        def forward(self, x, **kwargs):
            return {"x": x, "kwargs": kwargs}

    result = DictGatherDataParallel(Echo(), ["cpu", "cpu"])(torch.arange(5), scale=torch.arange(5) * 2, name="x")
    assert torch.equal(result["x"], torch.arange(5))
    assert torch.equal(result["kwargs"]["scale"], torch.arange(5) * 2)


def test_each_replica_gets_one_dict():
    """Image sizes may differ, and devices without a dict are not used. A single dict runs in the calling thread."""
    calls = []

    class Sizes(nn.Module):
        def forward(self, batch):
            calls.append((threading.current_thread().name, tuple(batch["img_data"].shape), batch["info"]))
            return batch["img_data"].mean(), batch["img_data"].new_ones(1)

    parallel = UserScatteredDataParallel(Sizes(), ["cpu"] * 3)
    batches = [{"img_data": torch.full((1, 3, n, n + 1), float(n)), "info": [f"{n}.jpg"]} for n in (2, 4, 3)]
    assert [values.tolist() for values in parallel(batches)] == [[2, 4, 3], [1, 1, 1]]
    assert sorted(calls) == [(f"replica {i}", (1, 3, n, n + 1), [f"{n}.jpg"]) for i, n in enumerate((2, 4, 3))]
    assert parallel(batches[:2])[0].tolist() == [2, 4]
    assert parallel(batches[:1])[0].item() == 2
    assert calls[-1][0] == threading.current_thread().name


def test_replicas_share_parameters_and_replica_0_the_buffers():
    class Counter(nn.Linear):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    module = Counter(2, 1)
    module.register_buffer("calls", torch.zeros(1))
    outputs = UserScatteredDataParallel(module, ["cpu"] * 3)([torch.ones(2) * n for n in (1, 2, 4)])
    outputs.sum().backward()
    assert module.weight.grad.tolist() == [[7, 7]]
    assert module.calls.item() == 1


def test_gradients_equal_those_of_the_whole_batch():
    module = tiny_module(crit=MaskedNLLLoss()).double()
    images, labels = torch.randn(4, 3, 32, 40, dtype=torch.float64), torch.randint(0, 3, (4, 4, 5))
    batches = [{"img_data": images[i : i + 2], "seg_label": labels[i : i + 2]} for i in (0, 2)]
    parameters = list(module.parameters())
    loss = UserScatteredDataParallel(module, ["cpu", "cpu"])(batches)[0].mean()
    expected, _ = module({"img_data": images, "seg_label": labels})
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_replication_callbacks_share_a_context_per_submodule():
    calls = []

    class Part(nn.Identity):
        def __data_parallel_replicate__(self, context, copy_id):
            calls.append((context, copy_id))

    DataParallelWithCallback(nn.Sequential(Part()), ["cpu"] * 3)(torch.ones(3))
    assert calls == [(calls[0][0], index) for index in range(3)]


def test_module_on_another_device_is_rejected():
    with pytest.raises(ValueError, match=r"cpu.* meta"):
        DataParallelWithCallback(nn.Linear(2, 2, device="meta"), ["cpu", "cpu"])(torch.ones(2, 2))


def test_patched_data_parallel_synchronizes_and_stops_on_errors():
    class Subclass(nn.DataParallel):
        def gather(self, outputs, output_device):
            return torch.cat(outputs)

    norm = SynchronizedBatchNorm2d(3, clamp_variance=False)
    x = torch.randn(4, 3, 5, 5)
    for kind in (nn.DataParallel, Subclass):
        parallel = kind(norm)
        patch_replication_callback(parallel)
        patch_replication_callback(parallel)  # a second call has no effect
        assert isinstance(parallel, kind)
        parallel.device_ids, parallel.output_device, parallel.dim = ["cpu", "cpu"], "cpu", 0
        torch.testing.assert_close(parallel(x), nn.BatchNorm2d(3)(x))
        replicas = parallel.replicate(norm, parallel.device_ids)
        with pytest.raises(ValueError, match="expected 4D"):
            parallel.parallel_apply(replicas, [(x[:1],), (x[1],)], [{}, {}])


def test_short_programs_with_cpu_replicas_exit_cleanly():
    """No replica thread runs after the interpreter has ended, even on a busy machine."""
    program = """
import torch
from mit_semseg.lib.nn import UserScatteredDataParallel
torch.set_num_threads(1)
module = UserScatteredDataParallel(torch.nn.Linear(4, 2), device_ids=["cpu", "cpu"])
module([torch.randn(3, 4), torch.randn(5, 4)]).sum().backward()
"""
    jobs = [subprocess.Popen([sys.executable, "-c", program], env=ENV, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(job.communicate(timeout=120)[1], job.returncode) for job in jobs] == [(b"", 0)] * 2
