"""Data parallelism in one process over inputs that are dicts: scatter, replicas, gather.

`torch.nn.DataParallel` splits one large tensor. Here the caller may hand in one input per device, each a dict with
images of its own size, so nothing has to be padded to a common shape. The devices may also be the CPU, several times:
its replicas are threads that share the parameters.
"""

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn

from ..batchnorm import SynchronizedBatchNorm
from ..replicas import ReplicaError, ReplicaGroup
from ..scatter import as_device, async_copy_to, copy_to_device, gather, scatter, user_scattered_collate  # noqa: F401

UNWIND_SECONDS = 1.0  # for threads to end after all outputs, or an error, have arrived


def join_replicas(module: nn.Module, replicas: Sequence[nn.Module], timeout: float = 120.0) -> ReplicaGroup:
    """Let the synchronized batch norms of `replicas`, all made from `module`, share their statistics.

    Args:
        timeout: seconds that a replica waits for the others.
    """
    group = ReplicaGroup(len(replicas), timeout)
    names = [name for name, part in module.named_modules() if isinstance(part, SynchronizedBatchNorm)]
    for rank, replica in enumerate(replicas):
        layers = (part for part in replica.modules() if isinstance(part, SynchronizedBatchNorm))
        for name, layer in zip(names, layers, strict=True):
            layer.join(group, rank, name)
    return group


class _CallbackContext:
    """Shared by the copies of one sub-module during one replication; `__data_parallel_replicate__` may store in it."""


def _execute_callbacks(module: nn.Module, replicas: Sequence[nn.Module]) -> None:
    contexts = [_CallbackContext() for _ in module.modules()]
    for rank, replica in enumerate(replicas):
        for context, part in zip(contexts, replica.modules(), strict=True):
            if hasattr(part, "__data_parallel_replicate__"):
                part.__data_parallel_replicate__(context, rank)


def _share(module: nn.Module, count: int) -> list[nn.Module]:
    """Copies of a module that share its parameters; the first shares its buffers too, the others have copies."""
    attributes = [value for part in module.modules() for value in vars(part).values()]
    kept = [value for value in attributes if isinstance(value, (torch.Tensor, dist.ProcessGroup))]
    kept += module.parameters()
    buffers = list(module.buffers())
    copies = [buffers, *([buffer.detach().clone() for buffer in buffers] for _ in range(count - 1))]
    return [
        copy.deepcopy(module, {id(old): new for old, new in zip([*kept, *buffers], [*kept, *own], strict=True)})
        for own in copies
    ]


def as_devices(ids: Sequence) -> list[torch.device]:
    """Devices from GPU numbers, names or devices."""
    return [as_device(device) for device in ids]


def run_replicas(
    replicas: Sequence[Callable],
    inputs: Sequence[tuple],
    kwargs: Sequence[dict],
    devices: Sequence[torch.device],
    group: ReplicaGroup,
) -> list:
    """Call every replica with its inputs, each in a thread of its own with this thread's gradient and autocast modes.

    Returns:
        The outputs, in the order of the replicas.

    Raises:
        ReplicaError: a replica did not arrive at a meeting in time.
        Exception: the first that a replica raised, with its own traceback.
    """
    finished: queue.SimpleQueue = queue.SimpleQueue()
    types = {device.type for device in devices}
    casts = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types}
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    streams = [torch.cuda.current_stream(device) if device.type == "cuda" else None for device in devices]

    def work(rank: int) -> None:
        device = devices[rank]
        try:
            with ExitStack() as stack:
                # Replica 0 works for all in a meeting and needs all streams; its own, and with it its device, last.
                for stream in filter(None, (*streams, streams[rank])):
                    stack.enter_context(torch.cuda.stream(stream))
                stack.enter_context(torch.inference_mode(modes[1]))
                stack.enter_context(torch.set_grad_enabled(modes[0]))
                enabled, dtype = casts[device.type]
                stack.enter_context(torch.autocast(device.type, dtype, enabled=enabled))
                finished.put((rank, replicas[rank](*inputs[rank], **kwargs[rank]), None))
        except BaseException as error:
            finished.put((rank, None, error))

    # Daemon threads: a replica that hangs does not keep the process from exiting.
    threads = [
        threading.Thread(target=work, args=(rank,), name=f"replica {rank}", daemon=True)
        for rank in range(len(replicas))
    ]
    for thread in threads:
        thread.start()
    try:
        return _outputs(finished, len(replicas), group)
    finally:
        # A thread that is still unwinding while the interpreter exits aborts the process.
        deadline = time.monotonic() + UNWIND_SECONDS
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))


def _outputs(finished: queue.SimpleQueue, count: int, group: ReplicaGroup) -> list:
    """Outputs of `count` replicas in the order of their ranks, from a queue of (rank, output, error)."""
    outputs, stopped, running = [None] * count, None, set(range(count))
    while running:
        try:
            rank, output, error = finished.get(timeout=None if len(running) == count else group.timeout)
        except queue.Empty:
            group.stop()
            names = ", ".join(map(str, sorted(running)))
            raise ReplicaError(f"replica {names} did not finish within {group.timeout:g} s of the others") from None
        running.discard(rank)
        outputs[rank] = output
        if isinstance(error, ReplicaError) and group.stopped:
            stopped = error  # the error that stopped the group follows
        elif error is not None:
            group.stop()
            raise error
    if stopped is not None:
        raise stopped
    return outputs


class DataParallelWithCallback(nn.DataParallel):
    """`nn.DataParallel` for inputs of any structure, on GPUs or on the CPU several times.

    After replicating it joins synchronized batch norms, and calls `__data_parallel_replicate__(context, copy_id)` on
    every sub-module that has it. An exception in a replica ends the others, and is raised with its own traceback. The
    backward pass runs on the devices' default streams, and cannot recompute a replica's norms (activation checkpoints).

    Args:
        module: on the first of the devices.
        device_ids: GPUs (numbers or devices), or CPU devices such as `["cpu", "cpu"]`; None takes all GPUs. On a single
            device the module is called as it is.
        output_device: where outputs are gathered; None means the first device.
        dim: dimension along which tensors are split and gathered.
        timeout: seconds that a replica waits for the others in a synchronized batch norm.

    Raises:
        ValueError: CPU and GPUs together.
    """

    def __init__(self, module, device_ids=None, output_device=None, dim=0, *, timeout: float = 120.0):
        devices = as_devices(device_ids or ())
        kinds = {device.type for device in devices}
        if len(kinds) > 1:
            raise ValueError(f"replicas are all on GPUs or all on the CPU, not on {', '.join(map(str, devices))}")
        if kinds == {"cpu"}:
            nn.Module.__init__(self)
            self.module, self.dim = module, dim
            self.device_ids, self.output_device, self.src_device_obj = devices, devices[0], devices[0]
        else:
            super().__init__(module, device_ids, output_device, dim)
        self.timeout = timeout
        self._group: ReplicaGroup | None = None

    def _devices(self, count: int) -> list[torch.device]:
        return as_devices(self.device_ids[:count])

    def forward(self, *inputs, **kwargs):
        """Scatter the inputs, run the replicas, gather their outputs.

        Raises:
            ValueError: the module is not on the first device.
        """
        inputs, kwargs = self.scatter(inputs, kwargs, self.device_ids)
        if len(inputs) == 1:
            return self.module(*inputs[0], **kwargs[0])
        home = self._devices(1)[0]
        elsewhere = {t.device for t in chain(self.module.parameters(), self.module.buffers())} - {home}
        if elsewhere:
            raise ValueError(f"the module must be on {home}, the first of its devices, not on {elsewhere.pop()}")
        replicas = self.replicate(self.module, self.device_ids[: len(inputs)])
        try:
            outputs = self.parallel_apply(replicas, inputs, kwargs)
        finally:
            self._group = None
        return self.gather(outputs, self.output_device)

    def scatter(self, inputs, kwargs, device_ids):
        """One tuple of inputs and one dict of keyword arguments per device."""
        if not device_ids:
            return (inputs,), (kwargs,)
        parts = scatter((inputs, kwargs), self._devices(len(device_ids)), self.dim)
        return tuple(part[0] for part in parts), tuple(part[1] for part in parts)

    def replicate(self, module, device_ids):
        """Copies of `module`, one per device, with their callbacks executed."""
        on_cpu = self._devices(1)[0].type == "cpu"
        replicas = _share(module, len(device_ids)) if on_cpu else super().replicate(module, device_ids)
        self._group = join_replicas(module, replicas, self.timeout)
        _execute_callbacks(module, replicas)
        return replicas

    def parallel_apply(self, replicas, inputs, kwargs):
        """Outputs of the replicas, each run in a thread; see `run_replicas`."""
        return run_replicas(replicas, inputs, kwargs, self._devices(len(replicas)), self._group)

    def gather(self, outputs, output_device):
        """The outputs on one device; see `gather`."""
        return gather(outputs, output_device, self.dim)


def patch_replication_callback(data_parallel: nn.DataParallel) -> None:
    """Give an existing `nn.DataParallel` object the replication hook of `DataParallelWithCallback`.

    Raises:
        TypeError: the object is no `nn.DataParallel`.
    """
    if not isinstance(data_parallel, nn.DataParallel):
        raise TypeError(f"patch_replication_callback takes an nn.DataParallel, not {type(data_parallel).__name__}")
    if isinstance(data_parallel, DataParallelWithCallback):
        return  # has it
    replicate, groups = data_parallel.replicate, {}

    def with_callback(self, module, device_ids):
        replicas = replicate(module, device_ids)
        groups["latest"] = join_replicas(module, replicas)
        _execute_callbacks(module, replicas)
        return replicas

    def in_threads(self, replicas, inputs, kwargs):
        return run_replicas(replicas, inputs, kwargs, as_devices(self.device_ids[: len(replicas)]), groups["latest"])

    data_parallel.replicate = MethodType(with_callback, data_parallel)
    data_parallel.parallel_apply = MethodType(in_threads, data_parallel)


class DictGatherDataParallel(DataParallelWithCallback):
    """Data parallel module whose replicas return dicts; the values are gathered key by key."""


class UserScatteredDataParallel(DictGatherDataParallel):
    """Data parallel module whose caller has already made one input per device.

    `module(inputs)` takes a list with one element (usually a dict) for each device in use, at most as many as there are
    devices; every element may hold tensors of its own size.
    """

    def scatter(self, inputs, kwargs, device_ids):
        """One tuple of inputs and one dict of keyword arguments per element of the list.

        Raises:
            ValueError: the input is no list, is empty, or has more elements than there are devices.
        """
        given, most = inputs[0] if len(inputs) == 1 else None, max(len(device_ids), 1)
        if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= most:
            raise ValueError(
                f"UserScatteredDataParallel takes one list with 1 to {most} elements, one per device, not "
                f"{len(given) if isinstance(given, (list, tuple)) else type(given).__name__}"
            )
        devices = self._devices(len(given)) or [None]
        scattered = [
            (element if device is None else copy_to_device(element, device),)
            for element, device in zip(given, devices, strict=False)
        ]
        return tuple(scattered), tuple(dict(kwargs) for _ in scattered)
