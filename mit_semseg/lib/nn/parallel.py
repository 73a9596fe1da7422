"""Data parallelism in one process over inputs that are dicts: scatter, gather and the replication hook.

`torch.nn.DataParallel` splits one large tensor. Here the caller hands in one input per device, each a dict with images
of its own size, so nothing has to be padded to a common shape.
"""

from collections.abc import Mapping, Sequence
from types import MethodType

import torch
from torch import nn

from .batchnorm import BatchNormGroup, _SynchronizedBatchNorm


def user_scattered_collate(batch: list) -> list:
    """Collate function that leaves the list as it is: one element per device."""
    return batch


def async_copy_to(obj, device, main_stream=None):
    """Copy every tensor in `obj` to a device, without waiting where the memory is pinned.

    Args:
        obj: a tensor, or (nested) dicts, lists and tuples of anything; what is not a tensor is passed through.
        device: a `torch.device`, a string, or the index of a GPU.
        main_stream: CUDA stream that will use the copies; their memory is not reused before that stream is done.

    Returns:
        The same structure with tensors on `device`.
    """
    if isinstance(obj, torch.Tensor):
        copy = obj.to(device, non_blocking=True)
        if main_stream is not None and copy.is_cuda:
            copy.record_stream(main_stream)
        return copy
    if isinstance(obj, Mapping):
        return {key: async_copy_to(value, device, main_stream) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*(async_copy_to(value, device, main_stream) for value in obj))
    if isinstance(obj, Sequence) and not isinstance(obj, str):
        return type(obj)(async_copy_to(value, device, main_stream) for value in obj)
    return obj


def join_replicas(module: nn.Module, replicas: list[nn.Module]) -> None:
    """Let the synchronized batch norms of `replicas`, all made from `module`, share their statistics."""
    layers = [[m for m in replica.modules() if isinstance(m, _SynchronizedBatchNorm)] for replica in replicas]
    names = [name for name, m in module.named_modules() if isinstance(m, _SynchronizedBatchNorm)]
    for name, copies in zip(names, zip(*layers, strict=True), strict=True):
        group = BatchNormGroup(len(replicas), name=name)
        for rank, copy in enumerate(copies):
            copy.join(group, rank)


class _CallbackContext:
    """Shared by the copies of one sub-module during one replication; `__data_parallel_replicate__` may store in it."""


def _execute_callbacks(module: nn.Module, replicas: list[nn.Module]) -> None:
    join_replicas(module, replicas)
    contexts = [_CallbackContext() for _ in module.modules()]
    for rank, replica in enumerate(replicas):
        for context, part in zip(contexts, replica.modules(), strict=True):
            if hasattr(part, "__data_parallel_replicate__"):
                part.__data_parallel_replicate__(context, rank)


class DataParallelWithCallback(nn.DataParallel):
    """`nn.DataParallel` that, after replicating, joins synchronized batch norms and calls
    `__data_parallel_replicate__(context, copy_id)` on every sub-module that has it."""

    def replicate(self, module, device_ids):
        """Copies of `module`, one per device, with their callbacks executed."""
        replicas = super().replicate(module, device_ids)
        _execute_callbacks(module, replicas)
        return replicas


def patch_replication_callback(data_parallel: nn.DataParallel) -> None:
    """Give an existing `nn.DataParallel` object the replication hook of `DataParallelWithCallback`.

    Raises:
        TypeError: the object is no `nn.DataParallel`.
    """
    if not isinstance(data_parallel, nn.DataParallel):
        raise TypeError(f"patch_replication_callback takes an nn.DataParallel, not {type(data_parallel).__name__}")
    replicate = data_parallel.replicate

    def with_callback(self, module, device_ids):
        replicas = replicate(module, device_ids)
        _execute_callbacks(module, replicas)
        return replicas

    data_parallel.replicate = MethodType(with_callback, data_parallel)


class DictGatherDataParallel(DataParallelWithCallback):
    """Data parallel module whose replicas return dicts; the values are gathered key by key."""

    def gather(self, outputs, output_device):
        """Gather a list of dicts (or of what `nn.DataParallel` takes) on one device."""
        if outputs and isinstance(outputs[0], Mapping):
            return {
                key: super(DictGatherDataParallel, self).gather([o[key] for o in outputs], output_device)
                for key in outputs[0]
            }
        return super().gather(outputs, output_device)


class UserScatteredDataParallel(DictGatherDataParallel):
    """Data parallel module whose caller has already made one input per device.

    `module(inputs)` takes a list with one element (usually a dict) for each device in use, at most as many as there are
    devices; every element may hold tensors of its own size. Without a GPU the only element goes to the module as it is.
    """

    def forward(self, *inputs, **kwargs):
        """Run every element of the list on its device and gather the results on the first."""
        if not self.device_ids:
            scattered, kwargs_list = self.scatter(inputs, kwargs, [None])
            return self.module(*scattered[0], **kwargs_list[0])
        return super().forward(*inputs, **kwargs)

    def scatter(self, inputs, kwargs, device_ids):
        """One tuple of inputs and one dict of keyword arguments per element of the list.

        Raises:
            ValueError: the input is no list, is empty, or has more elements than there are devices.
        """
        given = inputs[0] if len(inputs) == 1 else None
        if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= len(device_ids):
            raise ValueError(
                f"UserScatteredDataParallel takes one list with 1 to {len(device_ids)} elements, one per device, not "
                f"{len(given) if isinstance(given, (list, tuple)) else type(given).__name__}"
            )
        devices = [None if d is None else torch.device("cuda", d) for d in device_ids]
        scattered = [
            (element if device is None else async_copy_to(element, device),)
            for element, device in zip(given, devices, strict=False)
        ]
        return tuple(scattered), tuple(dict(kwargs) for _ in scattered)
