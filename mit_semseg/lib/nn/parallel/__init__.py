"""Data parallelism over several devices in one process, for inputs that are dicts.

`torch.nn.DataParallel` splits one large tensor. The classes below also accept one dict per device, with images of
different sizes. Several replicas can run on the CPU, in threads, with shared parameters.
"""

import copy
import queue
import threading
import time
from contextlib import ExitStack
from itertools import chain
from types import SimpleNamespace

import torch
from torch import nn

from ..batchnorm import SynchronizedBatchNorm
from ..replicas import DEFAULT_TIMEOUT, ReplicaError, ReplicaGroup
from ..scatter import as_device, async_copy_to, copy_to_device, gather, scatter, user_scattered_collate  # noqa: F401


class DataParallelWithCallback(nn.DataParallel):
    """`nn.DataParallel` for nested inputs and outputs (dicts, lists, tuples), on GPUs or on several CPU replicas.

    Batch norms of class `SynchronizedBatchNorm*d` use the statistics of all replicas. If a sub-module has a
    method `__data_parallel_replicate__(context, copy_id)`, this method is called for each replica. Activation
    checkpointing of synchronized norms is not supported.

    Args:
        module: the module, which must be on the first device.
        device_ids: GPUs (indices or devices), or CPU devices such as `["cpu", "cpu"]`; None uses all GPUs. With a
            single device, the module itself is called, without replicas.
        output_device, dim: see `nn.DataParallel`.
        timeout: seconds that a replica waits for other replicas.
    """

    def __init__(self, module, device_ids=None, output_device=None, dim=0, *, timeout: float = DEFAULT_TIMEOUT):
        devices = [as_device(device) for device in device_ids or ()]
        if devices and devices[0].type == "cpu":
            nn.Module.__init__(self)
            self.module, self.dim = module, dim
            self.device_ids, self.output_device, self.src_device_obj = devices, devices[0], devices[0]
        else:
            super().__init__(module, device_ids, output_device, dim)
        self.timeout = timeout
        self._group: ReplicaGroup | None = None

    def forward(self, *inputs, **kwargs):
        """Scatter the inputs, run the replicas, gather their outputs."""
        inputs, kwargs = self.scatter(inputs, kwargs, self.device_ids)
        if len(inputs) == 1:
            return self.module(*inputs[0], **kwargs[0])
        first = as_device(self.device_ids[0])
        others = {t.device for t in chain(self.module.parameters(), self.module.buffers())} - {first}
        if others:
            raise ValueError(f"the module must be on {first}, the first device, but it has tensors on {others.pop()}")
        replicas = self.replicate(self.module, self.device_ids[: len(inputs)])
        try:
            outputs = self.parallel_apply(replicas, inputs, kwargs)
        finally:
            self._group = None
        return self.gather(outputs, self.output_device)

    def scatter(self, inputs, kwargs, device_ids):
        if not device_ids:
            return (inputs,), (kwargs,)
        parts = scatter((inputs, kwargs), device_ids, self.dim)
        return tuple(part[0] for part in parts), tuple(part[1] for part in parts)

    def replicate(self, module, device_ids):
        on_cpu = as_device(self.device_ids[0]).type == "cpu"
        replicas = _share_parameters(module, len(device_ids)) if on_cpu else super().replicate(module, device_ids)
        self._group = ReplicaGroup(len(replicas), self.timeout)
        named = [(name, SimpleNamespace()) for name, _ in module.named_modules()]
        for index, replica in enumerate(replicas):
            for (name, context), part in zip(named, replica.modules(), strict=True):
                if isinstance(part, SynchronizedBatchNorm):
                    part.replicas, part.replica_index, part.layer_name = self._group, index, name
                if hasattr(part, "__data_parallel_replicate__"):
                    part.__data_parallel_replicate__(context, index)
        return replicas

    def parallel_apply(self, replicas, inputs, kwargs):
        """Call each replica in a thread with the CUDA streams and modes (gradient, inference, autocast) of the caller.

        Raises the first exception of a replica with its original traceback, or ReplicaError if a replica timed out.
        """
        results: queue.SimpleQueue = queue.SimpleQueue()
        devices = [as_device(device) for device in self.device_ids[: len(replicas)]]
        kind = devices[0].type
        autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        grad_enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        streams = [torch.cuda.current_stream(device) for device in devices if kind == "cuda"]

        def run(index: int) -> None:
            try:
                with ExitStack() as stack:
                    # Replica 0 uses all devices in synchronized layers. The last stream selects the replica's device.
                    for stream in (*streams, *streams[index : index + 1]):
                        stack.enter_context(torch.cuda.stream(stream))
                    stack.enter_context(torch.inference_mode(inference))
                    stack.enter_context(torch.set_grad_enabled(grad_enabled))
                    stack.enter_context(torch.autocast(kind, dtype, enabled=autocast))
                    results.put((index, replicas[index](*inputs[index], **kwargs[index]), None))
            except BaseException as error:
                results.put((index, None, error))

        # With daemon threads, a hanging replica does not block the exit of the process.
        indices = range(len(replicas))
        threads = [threading.Thread(target=run, args=(i,), name=f"replica {i}", daemon=True) for i in indices]
        for thread in threads:
            thread.start()
        try:
            return _collect_outputs(results, len(replicas), self._group)
        finally:
            # A thread that still runs at interpreter exit aborts the process: wait for all threads, at most one second.
            deadline = time.monotonic() + 1
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))

    def gather(self, outputs, output_device):
        return gather(outputs, output_device, self.dim)


DictGatherDataParallel = DataParallelWithCallback  # deprecated name from version 2


class UserScatteredDataParallel(DataParallelWithCallback):
    """Data parallelism for a list with one input (usually a dict) per device; a shorter list uses the first devices."""

    def scatter(self, inputs, kwargs, device_ids):
        elements, limit = inputs[0] if len(inputs) == 1 else None, max(len(device_ids), 1)
        if not isinstance(elements, (list, tuple)) or not 1 <= len(elements) <= limit:
            actual = len(elements) if isinstance(elements, (list, tuple)) else type(elements).__name__
            raise ValueError(f"expected one list with 1 to {limit} elements, one per device, got {actual}")
        if device_ids:
            elements = map(copy_to_device, elements, device_ids)
        scattered = tuple((element,) for element in elements)
        return scattered, tuple(dict(kwargs) for _ in scattered)


def patch_replication_callback(data_parallel: nn.DataParallel) -> None:
    """Convert an `nn.DataParallel` object in place to `DataParallelWithCallback`; methods of a subclass are kept."""
    if not isinstance(data_parallel, nn.DataParallel):
        raise TypeError(f"expected an nn.DataParallel, got {type(data_parallel).__name__}")
    if not isinstance(data_parallel, DataParallelWithCallback):
        kind, new = type(data_parallel), DataParallelWithCallback
        data_parallel.__class__ = new if kind is nn.DataParallel else type(kind.__name__, (kind, new), {})
        data_parallel.timeout, data_parallel._group = DEFAULT_TIMEOUT, None


def _share_parameters(module: nn.Module, count: int) -> list[nn.Module]:
    """Return `count` copies of a module. All copies share its parameters; copy 0 also shares its buffers."""
    parameters = {id(parameter): parameter for parameter in module.parameters()}
    replicas = []
    for index in range(count):
        buffers = {id(buffer): buffer.detach().clone() if index else buffer for buffer in module.buffers()}
        replicas.append(copy.deepcopy(module, parameters | buffers))
    return replicas


def _collect_outputs(results: queue.SimpleQueue, count: int, group: ReplicaGroup) -> list:
    """Return the outputs of all replicas, or raise the first error; `results` receives (index, output, error)."""
    outputs, running = [None] * count, set(range(count))
    while running:
        try:
            # Wait without timeout for the first result, and with timeout for each further result.
            index, output, error = results.get(timeout=None if len(running) == count else group.timeout)
        except queue.Empty:
            group.stop()
            names = ", ".join(map(str, sorted(running)))
            raise ReplicaError(f"replica {names} still runs {group.timeout:g} s after another one finished") from None
        running.discard(index)
        outputs[index] = output
        # A ReplicaError after `stop` was caused by another replica, whose own error follows in the queue.
        if error is not None and not (isinstance(error, ReplicaError) and group.stopped):
            group.stop()
            raise error
    return outputs
