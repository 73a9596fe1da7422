"""Copy, scatter and gather tensors in nested dicts, lists and tuples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..utils import map_tensors

_copy_streams: dict[torch.device, "torch.cuda.Stream"] = {}


def user_scattered_collate(batch: list) -> list:
    """Return the list unchanged; a collate function for datasets whose items are batches, one per device."""
    return batch


def as_device(device: torch.device | str | int) -> torch.device:
    """Convert a device name or GPU index (int or string); `cuda` without index becomes the current GPU."""
    if isinstance(device, int) or (isinstance(device, str) and device.isdecimal()):
        return torch.device("cuda", int(device))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _list_tensors(obj) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_tensors(tensors.append, obj)
    return tensors


def async_copy_to(obj, device, main_stream=None):
    """Copy all tensors in nested dicts, lists and tuples to a device; copies to a CUDA GPU are asynchronous.

    `main_stream`: CUDA stream that uses the copies; memory of a copy is not reused before this stream has finished.
    """
    device = as_device(device)
    asynchronous = device.type not in ("cpu", "mps")  # there, an asynchronous copy could be read before it is complete

    def copy(tensor: Tensor) -> Tensor:
        result = tensor.to(device, non_blocking=asynchronous)
        if main_stream is not None and result.is_cuda:
            result.record_stream(main_stream)
        return result

    return map_tensors(copy, obj)


def copy_to_device(obj, device: torch.device | str | int):
    """Like `async_copy_to`, but copies from CPU to GPU use a separate stream, in parallel with queued kernels."""
    device = as_device(device)
    if device.type != "cuda" or {tensor.device.type for tensor in _list_tensors(obj)} != {"cpu"}:
        return async_copy_to(obj, device)
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    current_stream, copy_stream = torch.cuda.current_stream(device), _copy_streams[device]
    with torch.cuda.stream(copy_stream):
        copies = async_copy_to(obj, device, current_stream)
    current_stream.wait_stream(copy_stream)
    return copies


class HostCopy:
    """Copy of all tensors in nested dicts, lists and tuples to the CPU; copies from a GPU are asynchronous."""

    def __init__(self, obj):
        self._copies = map_tensors(lambda tensor: tensor.to("cpu", non_blocking=tensor.is_cuda), obj)
        devices = {tensor.device for tensor in _list_tensors(obj) if tensor.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self):
        """Return the copies when they are complete, without waiting for work that was queued after them."""
        for event in self._events:
            event.synchronize()
        return self._copies


def scatter(obj, devices: Sequence[torch.device | str | int], dim: int = 0) -> list:
    """Split all tensors in nested dicts, lists and tuples along a dimension; return a list with one part per device.

    Other values are passed to every device. If there are fewer parts than devices, only the first devices are used.
    """
    counts = {len(tensor.chunk(len(devices), dim)) for tensor in _list_tensors(obj)}
    if len(counts) > 1:
        raise ValueError(
            f"tensors have different numbers of chunks: {sorted(counts)}; all need the same size in dimension {dim}"
        )
    return [
        copy_to_device(map_tensors(lambda tensor, i=i: tensor.chunk(len(devices), dim)[i], obj), device)
        for i, device in enumerate(devices[: counts.pop()] if counts else devices)
    ]


def gather(outputs: Sequence, device: torch.device | str, dim: int = 0):
    """Concatenate the output tensors of all replicas on one device; stack scalars; take other values from replica 0."""
    first = outputs[0]
    if isinstance(first, Tensor):
        copies = [output.to(device) for output in outputs]
        return torch.stack(copies) if first.dim() == 0 else torch.cat(copies, dim)
    if isinstance(first, Mapping):
        return {key: gather([output[key] for output in outputs], device, dim) for key in first}
    if isinstance(first, (list, tuple)):
        values = [gather(elements, device, dim) for elements in zip(*outputs, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first
