"""Which devices to work on: from names on the command line to `torch.device`s."""

import os
import re
from collections.abc import Sequence

import torch

from ..build import auto_device
from ..engine import Processes
from ..engine.distributed import Place
from ..lib.utils import UserError

MOST_DEVICES = 1024


class NotSupportedCliException(UserError, ValueError):
    """A device that is not of a known form."""


def parse_devices(input_devices: str) -> list[str]:
    """Names of devices from a list such as `0-3`, `0,2`, `gpu0-gpu3` or `cpu`.

    Returns:
        `["gpu0", "gpu1", ...]`, each once; `cpu` stays `cpu`.

    Raises:
        NotSupportedCliException: a part is of another form.
    """
    devices: list[str] = []
    for part in input_devices.split(","):
        text = part.strip().lower()
        match = re.fullmatch(r"(gpu)?(\d+)-(?(1)(?:gpu)?)(\d+)", text)
        if text == "cpu":
            names = ["cpu"]
        elif re.fullmatch(r"(gpu)?\d+", text):
            names = [f"gpu{text.removeprefix('gpu')}"]
        elif match:
            low, high = sorted((int(match[2]), int(match[3])))
            if high - low >= MOST_DEVICES:
                raise NotSupportedCliException(f'"{text}" are {high - low + 1} devices: more than any machine has')
            names = [f"gpu{i}" for i in range(low, high + 1)]
        else:
            raise NotSupportedCliException(
                f'Can not recognize device: "{text}"; give GPU numbers such as 0, 0-3 or 0,2, or cpu'
            )
        devices += [name for name in names if name not in devices]
    return devices


def process_range(xpu: str, inp: Sequence[str | int]) -> list[str]:
    """Names of devices from the first to the last number, e.g. `process_range("gpu", ("0", "2"))`: gpu0, gpu1, gpu2."""
    low, high = sorted(map(int, inp))
    return [f"{xpu}{number}" for number in range(low, high + 1)]


def pick_devices(text: str | None) -> list[torch.device]:
    """The devices that this process works on.

    Args:
        text: as for `parse_devices`; `cpu` may come more than once, for several replicas or processes; or one device by
            PyTorch's name, `cuda:1` or `mps`. None and `auto` take the first GPU if there is one, else the CPU. In a
            job that torchrun has started every process takes one: the one at its place on this machine.

    Raises:
        UserError: a GPU that is not there, or not one for every process.
    """
    place, text = Place.of_this_process(), None if text == "auto" else text
    if place.size > 1:
        return [_device_of_process(text, place)]
    if text and text.split(":")[0] in ("cuda", "mps"):
        return [auto_device(text)]
    if text is None:
        return [torch.device("cuda:0" if torch.cuda.is_available() else "cpu")]
    if {part.strip().lower() for part in text.split(",")} == {"cpu"}:
        return [torch.device("cpu")] * len(text.split(","))
    names = parse_devices(text)
    if "cpu" in names:
        raise UserError(f"--gpus {text}: give GPUs, or cpu once or several times, but not both")
    return [_device(name) for name in names]


def _device_of_process(text: str | None, place: Place) -> torch.device:
    there = [f"gpu{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    names = there if text is None else parse_devices(text)
    if names == ["cpu"]:
        return torch.device("cpu")
    if names == ["gpu0"] and _has_own_gpu():
        return _device("gpu0")
    if len(names) < place.local_size or "cpu" in names:
        raise UserError(
            f"torchrun has started {place.local_size} processes on this machine, each of which takes one GPU, but "
            f"there are {', '.join(names)}: start fewer (--nproc_per_node), or give --gpus cpu"
        )
    return _device(names[place.local_rank])


def _has_own_gpu() -> bool:
    """Whether the launcher assigned this process its own GPU (`srun --gpus-per-task=1`); under torchrun all processes
    of a machine see the same GPUs."""
    given = "CUDA_VISIBLE_DEVICES" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return given and torch.cuda.device_count() == 1


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(name.removeprefix("gpu")), torch.cuda.device_count()
    if index >= count:
        there = f"GPUs 0 to {count - 1}" if count else "no GPU that PyTorch can use"
        raise UserError(f"{name} was asked for, but this machine has {there}; leave the option out, or give cpu")
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """A device for the log, with the GPU's name or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def describe_all(devices: Sequence[torch.device], processes: Processes) -> str:
    """The devices of this process, and how many processes there are."""
    others = f" in each of {processes.size} processes" if processes.size > 1 else ""
    return ", ".join(map(describe, devices)) + others
