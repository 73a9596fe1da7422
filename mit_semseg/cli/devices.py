"""Parse and check the devices that are given on the command line."""

import os
import re
from collections.abc import Sequence

import torch

from ..build import auto_device
from ..engine import World
from ..lib.utils import UserError


class NotSupportedCliException(UserError, ValueError):
    """A device name cannot be parsed."""


def parse_devices(input_devices: str) -> list[str]:
    """Parse a list of devices such as `0-3`, `0,2`, `gpu0-gpu3` or `cpu`.

    Returns:
        Device names without repetitions, e.g. `["gpu0", "gpu1"]` or `["cpu"]`.

    Raises:
        NotSupportedCliException: an entry of the list cannot be parsed.
    """
    devices: list[str] = []
    for entry in input_devices.split(","):
        text = entry.strip().lower()
        match = re.fullmatch(r"(gpu)?(\d+)-(?(1)(?:gpu)?)(\d+)", text)
        if text == "cpu":
            names = ["cpu"]
        elif re.fullmatch(r"(gpu)?\d+", text):
            names = [f"gpu{text.removeprefix('gpu')}"]
        elif match:
            names = process_range("gpu", (match[2], match[3]))
        else:
            raise NotSupportedCliException(
                f'Can not recognize device: "{text}"; give cpu, or GPU numbers such as "0", "0-3" or "0,2"'
            )
        devices += [name for name in names if name not in devices]
    return devices


def process_range(xpu: str, inp: Sequence[str | int]) -> list[str]:
    """Return the device names in a range, e.g. `["gpu0", "gpu1", "gpu2"]` for `process_range("gpu", ("0", "2"))`."""
    low, high = sorted(map(int, inp))
    return [f"{xpu}{number}" for number in range(low, high + 1)]


def pick_devices(text: str | None) -> list[torch.device]:
    """Return the devices of this process.

    Args:
        text: value of --gpus. This is a list for `parse_devices`, in which `cpu` can be repeated to get several
            replicas or processes; a PyTorch device such as `cuda:1` or `mps`; or None or `auto` for the first GPU, or
            the CPU if there is no GPU. In a torchrun job, the list has one device per local rank, in this order, and
            None is the list of all GPUs.

    Raises:
        UserError: a GPU does not exist, GPUs and `cpu` are combined, or there are more ranks than GPUs.
    """
    world, text = World.from_environment(), None if text == "auto" else text
    if world.size > 1:
        return [_device_of_rank(text, world)]
    if text is None or text.split(":")[0] in ("cuda", "mps"):
        return [auto_device(text or "auto")]
    names = [entry.strip().lower() for entry in text.split(",")]
    if set(names) == {"cpu"}:
        return [torch.device("cpu")] * len(names)
    if "cpu" in names:
        raise UserError(f"--gpus {text}: GPUs and cpu cannot be combined; give only GPUs, or only cpu")
    return [_device(name) for name in parse_devices(text)]


def _device_of_rank(text: str | None, world: World) -> torch.device:
    gpus = [f"gpu{i}" for i in range(torch.cuda.device_count())]
    names = (gpus or ["cpu"]) if text is None else parse_devices(text)
    if names == ["cpu"]:
        return torch.device("cpu")
    # With `srun --gpus-per-task=1`, each rank can use only its own GPU; with torchrun, each rank can use all GPUs.
    assigned = "CUDA_VISIBLE_DEVICES" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if names == ["gpu0"] == gpus and assigned:
        return _device("gpu0")
    if len(names) < world.local_size or "cpu" in names:
        raise UserError(
            f"torchrun has started {world.local_size} processes on this machine, and each needs a GPU, but "
            f"the device list is {', '.join(names)}; start fewer processes (--nproc_per_node), or give --gpus cpu"
        )
    return _device(names[world.local_rank])


def _device(name: str) -> torch.device:
    index, count = int(name.removeprefix("gpu")), torch.cuda.device_count()
    if index >= count:
        available = f"GPUs 0 to {count - 1}" if count else "no GPU that PyTorch can use"
        raise UserError(f"--gpus {name} is not available; this machine has {available}; omit --gpus, or give cpu")
    return torch.device("cuda", index)


def describe_all(world: World) -> str:
    """Return a description of the devices for the log, with GPU names or the number of CPU threads."""
    threads = f"{torch.get_num_threads()} threads"
    names = [f"{d} ({torch.cuda.get_device_name(d) if d.type == 'cuda' else threads})" for d in world.devices]
    return ", ".join(names) + (f" on each of {world.size} ranks" if world.size > 1 else "")
