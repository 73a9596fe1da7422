"""Process group of a job that torchrun has started, and collectives that exchange Python values.

Every rank uses one device. Without torchrun there is only one rank, which may use several devices.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..lib.nn import ProcessGroupError, UserScatteredDataParallel
from ..lib.nn.batchnorm import SynchronizedBatchNorm
from ..lib.nn.sync_stats import is_communication_error
from ..lib.utils import UserError, first_sentence

DEFAULT_TIMEOUT = 1800.0  # seconds, the default of gloo in PyTorch
PROBE_SECONDS = 5.0  # timeout of the barrier that finds ranks that do not respond


@dataclass(frozen=True)
class World:
    """Rank, world size and devices of this process. The default is a single rank on the CPU.

    Attributes:
        rank, size: rank of this process, and world size.
        local_rank, local_size: rank among the ranks on this machine, and number of ranks on this machine.
        restarts: number of times that torchrun has restarted the job.
        devices: devices of this rank; each device gets its own batches. The CPU may be listed several times.
        timeout: timeout of collectives in seconds.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    devices: Sequence[torch.device] = (torch.device("cpu"),)
    timeout: float = DEFAULT_TIMEOUT

    @classmethod
    def from_environment(cls, **attributes) -> "World":
        """Return the world described by torchrun's environment variables; `attributes` are `devices` and `timeout`."""
        env = os.environ
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
            return cls(**attributes)
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size))
        return cls(rank, size, *local, int(env.get("TORCHELASTIC_RESTART_COUNT", 0)), **attributes)

    @property
    def num_devices(self) -> int:
        """Number of devices, summed over all ranks."""
        return len(self.devices) * self.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the checkpoints and the log."""
        return self.rank == 0

    @property
    def job(self) -> str:
        """Identifier that a restart by torchrun does not change: --rdzv_id, or host and process ID of torchrun."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return f"{socket.gethostname()}:{os.getppid()}" if run_id in ("", "none") else run_id

    @cached_property
    def _groups(self) -> list[dist.ProcessGroup]:
        """Two gloo process groups, even if gradients use NCCL: one for Python values, and one for `probe`."""
        return [dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout)) for _ in range(2)]

    def sum(self, values: Sequence[float], doing: str) -> list[float]:
        """Return the values, each summed over all ranks; `doing` describes the operation in error messages.

        Raises:
            ProcessGroupError: a rank ended or timed out.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self.communicating(doing):
            dist.all_reduce(total, group=self._groups[0])
        return total.tolist()

    def gather(self, value, doing: str) -> list:
        """Return a list with the value of every rank, ordered by rank. `value` must be picklable; see `sum`."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.communicating(doing):
            dist.all_gather_object(values, value, group=self._groups[0])
        return values

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Check that all ranks have the same values.

        Raises:
            UserError: values differ. All ranks raise the error, and the message lists these values.
        """
        gathered = self.gather({name: str(value) for name, value in values.items()}, "comparing the options")
        different = [name for name in gathered[0] if len({ranks.get(name) for ranks in gathered}) > 1]
        if different:
            lists = (
                f"{name} ({', '.join(f'rank {rank}: {values.get(name)}' for rank, values in enumerate(gathered))})"
                for name in different
            )
            raise UserError(f"start all ranks with the same command line; these values differ: {'; '.join(lists)}")

    @contextmanager
    def communicating(self, doing: str) -> Iterator[None]:
        """Context that converts errors of collectives to `ProcessGroupError`."""
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, ProcessGroupError)
            if not known and (self.size == 1 or not is_communication_error(error)):
                raise
            raise ProcessGroupError(f"{doing}: {error if known else first_sentence(error)}") from error

    def probe(self) -> str:
        """Return a description of the ranks that do not respond, or ''. Call this after a collective has failed."""
        try:
            dist.monitored_barrier(self._groups[1], timedelta(seconds=PROBE_SECONDS), wait_all_ranks=True)
        except RuntimeError as error:
            return f" ({first_sentence(error)})"
        return ""


@contextmanager
def join(devices: Sequence[torch.device], timeout: float = DEFAULT_TIMEOUT) -> Iterator[World]:
    """Context that yields the `World`; several ranks get a process group (NCCL for GPUs, gloo for CPUs).

    Raises:
        ProcessGroupError: another rank ended or timed out.
    """
    world = World.from_environment(devices=devices, timeout=timeout)
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])
    if world.size == 1:
        yield world
        return
    try:
        backend, limit = "nccl" if devices[0].type == "cuda" else "gloo", timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        # torchrun keeps its store when it restarts the job. Without the prefix, ranks would read the addresses of
        # killed ranks from the store.
        store = dist.PrefixStore(f"restart{world.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        _ = world._groups
    except RuntimeError as error:
        raise ProcessGroupError(
            f"rank {world.rank} could not connect to the other {world.size - 1} ranks at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({first_sentence(error)}); on several "
            f"machines, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the name of the network interface"
        ) from error
    try:
        yield world
    except ProcessGroupError as error:
        raise ProcessGroupError(
            f"rank {world.rank} of {world.size} stopped because another rank ended or timed out{world.probe()}: "
            f"{error}. See the log of that rank for the cause"
        ) from error
    dist.destroy_process_group()


@contextmanager
def first_on_machine(world: World) -> Iterator[None]:
    """Context whose block runs first on one rank of every machine, then on the other ranks, e.g. for a download."""
    if world.local_rank:
        world.gather(None, "waiting for the first rank of the machine")
    yield
    if not world.local_rank:
        world.gather(None, "waiting for the first rank of the machine")


def parallelize(module: nn.Module, world: World) -> nn.Module:
    """Wrap a module for data parallel training.

    Returns:
        For one device, the module itself. For several devices in one process, `UserScatteredDataParallel`, which takes
        a list with one batch per device and sums gradients over its replicas. For several ranks,
        `DistributedDataParallel`, which copies the parameters of rank 0 and averages gradients over the ranks.

    Raises:
        UserError: activation checkpointing or compilation is enabled for several devices in one process.
        ValueError: there are several ranks, and this rank has several devices.
    """
    if len(world.devices) > 1:
        if world.size > 1:
            raise ValueError(f"expected one device on each of {world.size} ranks, got {len(world.devices)} devices")
        for option, attribute in (("activation_checkpointing",) * 2, ("compile", "compiled")):
            if any(getattr(part, attribute, False) for part in module.modules()):
                raise UserError(
                    f"TRAIN.{option} does not work with several devices in one process; start one process per device "
                    f"(torchrun --nproc_per_node=N), or set TRAIN.{option} False"
                )
        return UserScatteredDataParallel(module, world.devices, timeout=world.timeout)
    if world.size == 1:
        return module
    for name, part in module.named_modules():
        if isinstance(part, SynchronizedBatchNorm):
            part.layer_name = name  # used in error messages
    # Do not broadcast buffers in every step: synchronized statistics are equal on all ranks, and local statistics are
    # broadcast before validation. The name of the option depends on the PyTorch version.
    names = signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    unused = getattr(module.encoder, "has_unused_parameters", False)
    options = {option: False, "gradient_as_bucket_view": True, "find_unused_parameters": unused}
    with world.communicating("comparing the networks"):
        return DistributedDataParallel(module, **options)


def broadcast_buffers(module: nn.Module, world: World) -> None:
    """Copy the buffers of rank 0 to all ranks. Statistics of unsynchronized batch norms differ between ranks."""
    if world.size > 1:
        with world.communicating("broadcasting running statistics"):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)
