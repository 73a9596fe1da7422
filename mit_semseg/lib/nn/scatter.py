"""Moving structures of tensors between devices: copy, split over several, and put together again."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def user_scattered_collate(batch: list) -> list:
    """Collate function that leaves the list as it is: one element per device."""
    return batch


def as_device(device: torch.device | str | int) -> torch.device:
    """Convert a name or a GPU index (int or digits) to a device; `cuda` without an index is the current GPU."""
    if isinstance(device, int) or (isinstance(device, str) and device.isdecimal()):
        return torch.device("cuda", int(device))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _map_tensors(function: Callable[[Tensor], Tensor], obj):
    """The same structure of dicts, lists and tuples, with every tensor replaced; anything else is passed through."""
    if isinstance(obj, Tensor):
        return function(obj)
    if isinstance(obj, Mapping):
        return {key: _map_tensors(function, value) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*(_map_tensors(function, value) for value in obj))
    if isinstance(obj, (list, tuple)):
        return type(obj)(_map_tensors(function, value) for value in obj)
    return obj


def async_copy_to(obj, device, main_stream=None):
    """Copy every tensor in `obj` to a device, without waiting where the memory is pinned.

    Args:
        obj: a tensor, or (nested) dicts, lists and tuples of anything; what is not a tensor is passed through.
        device: a `torch.device`, a string, or the index of a GPU, also as digits.
        main_stream: CUDA stream that will use the copies; their memory is not reused before that stream is done.

    Returns:
        The same structure with tensors on `device`.
    """

    # Only towards a GPU: a copy to the host that nobody waits for would be read before it is there.
    device = as_device(device)
    to_gpu = device.type == "cuda"

    def copied(tensor: Tensor) -> Tensor:
        result = tensor.to(device, non_blocking=to_gpu)
        if main_stream is not None and result.is_cuda:
            result.record_stream(main_stream)
        return result

    return _map_tensors(copied, obj)


_copy_streams: dict[torch.device, "torch.cuda.Stream"] = {}


def copy_to_device(obj, device: torch.device):
    """`async_copy_to` in which copies from the host to a GPU have a stream of their own, and do not queue behind the
    work that the GPU's current stream still has to do; that stream waits for the copies."""
    sources: set[str] = set()
    _map_tensors(lambda tensor: sources.add(tensor.device.type) or tensor, obj)
    device = as_device(device)
    if device.type != "cuda" or sources != {"cpu"}:
        return async_copy_to(obj, device)
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    main, side = torch.cuda.current_stream(device), _copy_streams[device]
    with torch.cuda.stream(side):
        copied = async_copy_to(obj, device, main)
    main.wait_stream(side)
    return copied


def scatter(obj, devices: Sequence[torch.device], dim: int = 0) -> list:
    """Split every tensor in `obj` along a dimension into one part per device.

    Args:
        obj: a tensor, or (nested) dicts, lists and tuples of anything; what is not a tensor goes to every device.
        devices: where the parts go. Short tensors reach fewer of them.
        dim: dimension to split.

    Returns:
        One structure per device that gets a part, the same everywhere if there is no tensor.

    Raises:
        ValueError: the tensors split into different numbers of parts.
    """
    numbers: set[int] = set()

    def count(tensor: Tensor) -> Tensor:
        numbers.add(len(tensor.chunk(len(devices), dim)))
        return tensor

    _map_tensors(count, obj)
    if len(numbers) > 1:
        raise ValueError(
            f"the tensors to scatter over {len(devices)} devices split into different numbers of parts, "
            f"{sorted(numbers)}: they must have the same size in dimension {dim}"
        )
    reached = devices[: numbers.pop()] if numbers else devices
    return [
        copy_to_device(_map_tensors(lambda tensor, i=i: tensor.chunk(len(devices), dim)[i], obj), device)
        for i, device in enumerate(reached)
    ]


def gather(outputs: Sequence, device: torch.device | str, dim: int = 0):
    """Concatenate the outputs of replicas on one device; scalars are stacked.

    Args:
        outputs: structures of the same form, of tensors in dicts, lists and tuples; of what is not a tensor, the first
            replica's is returned.
        device: where the result goes.
        dim: dimension to concatenate along.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        moved = [output.to(device) for output in outputs]
        return torch.stack(moved) if first.dim() == 0 else torch.cat(moved, dim)
    if isinstance(first, Mapping):
        return {key: gather([output[key] for output in outputs], device, dim) for key in first}
    if isinstance(first, (list, tuple)):
        values = [gather(parts, device, dim) for parts in zip(*outputs, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first
