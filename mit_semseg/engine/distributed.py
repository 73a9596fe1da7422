"""Ranks of a job started by torchrun: rank and world size, collectives over plain values, and their timeouts.

Every rank drives one device. Without torchrun the world has a single rank, which may drive several devices.
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

DEFAULT_TIMEOUT = 1800.0  # seconds, the default of gloo
PROBE_SECONDS = 5.0  # time that ranks have to answer after a collective failed


@dataclass(frozen=True)
class World:
    """The ranks of a job as seen from one of them; the defaults describe a process that torchrun has not started.

    Attributes:
        rank, size: of this rank and of the job.
        local_rank, local_size: on this machine.
        restarts: number of times that torchrun has restarted the job.
        devices: of this rank, one batch of each step goes to each; the CPU may be listed several times.
        timeout: seconds that a rank waits for the others in a collective.
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
        """Read torchrun's environment variables; `attributes` are `devices` and `timeout`."""
        env = os.environ
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
            return cls(**attributes)
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size))
        return cls(rank, size, *local, int(env.get("TORCHELASTIC_RESTART_COUNT", 0)), **attributes)

    @property
    def num_devices(self) -> int:
        """Number of devices of all ranks."""
        return len(self.devices) * self.size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0

    @property
    def job(self) -> str:
        """Identifier of the job that restarts keep: torchrun's --rdzv_id, or the process ID of torchrun."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return f"{socket.gethostname()}:{os.getppid()}" if run_id in ("", "none") else run_id

    @cached_property
    def _groups(self) -> list[dist.ProcessGroup]:
        """gloo groups for plain values (gradients may use NCCL) and for `probe`."""
        return [dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout)) for _ in range(2)]

    def sum(self, values: Sequence[float], doing: str) -> list[float]:
        """Sum values over all ranks; `doing` is a description for errors.

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
        """Return the values (any that can be pickled) of all ranks, ordered by rank; see `sum`."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.communicating(doing):
            dist.all_gather_object(values, value, group=self._groups[0])
        return values

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Check that all ranks have the same values.

        Raises:
            UserError: on all ranks, with the names and values that differ.
        """
        gathered = self.gather({name: str(value) for name, value in values.items()}, "comparing the options")
        different = [name for name in gathered[0] if len({ranks.get(name) for ranks in gathered}) > 1]
        if different:
            lists = (
                f"{name} ({', '.join(f'rank {rank}: {values.get(name)}' for rank, values in enumerate(gathered))})"
                for name in different
            )
            raise UserError(f"the ranks were started with different values of {'; '.join(lists)}")

    @contextmanager
    def communicating(self, doing: str) -> Iterator[None]:
        """Context that turns errors of collectives into `ProcessGroupError`."""
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, ProcessGroupError)
            if not known and (self.size == 1 or not is_communication_error(error)):
                raise
            raise ProcessGroupError(f"{doing}: {error if known else first_sentence(error)}") from error

    def probe(self) -> str:
        """Describe which ranks do not respond, or return ''; called on every rank after a collective failed."""
        try:
            dist.monitored_barrier(self._groups[1], timedelta(seconds=PROBE_SECONDS), wait_all_ranks=True)
        except RuntimeError as error:
            return f" ({first_sentence(error)})"
        return ""


@contextmanager
def join(devices: Sequence[torch.device], timeout: float = DEFAULT_TIMEOUT) -> Iterator[World]:
    """Join the job that torchrun has started (NCCL for GPUs, gloo for CPUs), or yield a world of one rank.

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
        # torchrun's store survives a restart; without a prefix, ranks would find addresses of killed ranks in it.
        store = dist.PrefixStore(f"restart{world.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        _ = world._groups
    except RuntimeError as error:
        raise ProcessGroupError(
            f"rank {world.rank} could not connect to the other {world.size - 1} ranks at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({first_sentence(error)}); on several machines "
            f"set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface"
        ) from error
    try:
        yield world
    except ProcessGroupError as error:
        raise ProcessGroupError(
            f"rank {world.rank} of {world.size} stopped because another rank ended or timed out{world.probe()}: "
            f"{error}. The log of that rank has the cause"
        ) from error
    dist.destroy_process_group()


@contextmanager
def first_on_machine(world: World) -> Iterator[None]:
    """Run the block on the first rank of every machine, then on the others: for downloads."""
    if world.local_rank:
        world.gather(None, "waiting for the first rank of the machine")
    yield
    if not world.local_rank:
        world.gather(None, "waiting for the first rank of the machine")


def parallelize(module: nn.Module, world: World) -> nn.Module:
    """Wrap a module for data parallel training; with several ranks, the parameters of rank 0 are used.

    Returns:
        The module itself for one device; `UserScatteredDataParallel`, called with a list of one batch per device, for
        several devices of one rank; `DistributedDataParallel` for several ranks.

    Raises:
        UserError: several devices of one rank together with activation checkpointing or compilation.
        ValueError: several devices together with several ranks.
    """
    if len(world.devices) > 1:
        if world.size > 1:
            raise ValueError(f"a job of {world.size} ranks takes one device per rank, got {len(world.devices)}")
        for option, attribute in (("activation_checkpointing",) * 2, ("compile", "compiled")):
            if any(getattr(part, attribute, False) for part in module.modules()):
                raise UserError(
                    f"TRAIN.{option} does not work with several devices in one process: start one process per device "
                    f"(torchrun --nproc_per_node=N), or set TRAIN.{option} False"
                )
        return UserScatteredDataParallel(module, world.devices, timeout=world.timeout)
    if world.size == 1:
        return module
    for name, part in module.named_modules():
        if isinstance(part, SynchronizedBatchNorm):
            part.layer_name = name  # for error messages
    # PyTorch has renamed the option. Buffers are not broadcast in every step: synchronized statistics are equal on all
    # ranks, others are broadcast before a validation.
    names = signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    with world.communicating("comparing the networks"):
        return DistributedDataParallel(module, **{option: False})


def broadcast_buffers(module: nn.Module, world: World) -> None:
    """Copy the buffers of rank 0 to all ranks: statistics of norms that are not synchronized differ between ranks."""
    if world.size > 1:
        with world.communicating("broadcasting running statistics"):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)
