"""The processes of a job, as torchrun starts them: who is who, how they add up and collect values, how long they wait.

One process drives one device. On its own, without torchrun, a process is a job of one.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..lib.nn import ProcessGroupError, UserScatteredDataParallel
from ..lib.nn.batchnorm import SynchronizedBatchNorm
from ..lib.nn.sync_stats import is_communication_error
from ..lib.utils import UserError, first_sentence
from .place import Place
from .pulse import Pulse

logger = logging.getLogger(__name__)

TIMEOUT = 1800.0  # seconds, the default of gloo
PATIENCE = 6 * 3600.0  # seconds that shares of work may differ by; a process that dies is noticed at once
POLL = 0.02  # seconds between two looks at whether all are there
LAST_WORDS = 2.0  # seconds for the processes of a broken job to say that they are still there


class Processes:
    """The processes of the job, seen from one of them.

    Args:
        place: of this process.
        store: where all of them can leave words; None for a process on its own.
        timeout: seconds that one waits for the others.
        pulse: that tells which of them have fallen silent, where one waits longer; None where that is not known.
    """

    def __init__(
        self,
        place: Place | None = None,
        store: dist.Store | None = None,
        timeout: float = TIMEOUT,
        pulse: Pulse | None = None,
    ):
        self.place, self.store, self.timeout, self.pulse = place or Place(), store, timeout, pulse
        self.rank, self.size = self.place.rank, self.place.size
        # Plain values travel over gloo, also where the gradients go over NCCL.
        self._group = self._patient = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout, PATIENCE)))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def sum(self, values: Sequence[float], doing: str) -> list[float]:
        """Sums of values over all processes.

        Args:
            doing: what the process is doing, for the error.

        Raises:
            ProcessGroupError: a process ended or did not answer in time.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self.waiting(doing):
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def collect(self, value, doing: str, *, patient: bool = False) -> list:
        """A value of every process, any that can be pickled, in the order of the ranks; errors as of `sum`.

        Args:
            patient: the others may need much longer than this process, as long as they give signs of life.
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.waiting(doing):
            if patient:
                self._wait_for_all()
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _wait_for_all(self) -> None:
        """Wait until all processes have come here."""
        meeting = dist.all_reduce(torch.zeros(1), group=self._patient, async_op=True)
        while self.pulse and not meeting.is_completed():
            if silent := self.pulse.silent():
                raise ProcessGroupError(
                    f"no sign of life for {self.timeout:g} s of process {', '.join(map(str, silent))}"
                )
            time.sleep(POLL)
        meeting.wait()

    def agree(self, values: Mapping[str, object]) -> None:
        """Check that all processes have been started alike.

        Args:
            values: to be the same everywhere, by what they are called.

        Raises:
            UserError: in all processes, naming those that differ.
        """
        mine = {name: str(value) for name, value in values.items()}
        everywhere = self.collect(mine, "comparing how the processes were started")
        different = [name for name in everywhere[0] if len({theirs.get(name) for theirs in everywhere}) > 1]
        if different:
            told = (
                f"{name} ({', '.join(f'rank {rank}: {theirs.get(name)}' for rank, theirs in enumerate(everywhere))})"
                for name in different
            )
            raise UserError(f"the processes of the job were not started alike, they differ in {'; '.join(told)}")

    @contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Turn the errors of a collective into `ProcessGroupError`."""
        try:
            yield
        except ProcessGroupError as error:
            raise ProcessGroupError(f"{doing}: {error}") from error
        except RuntimeError as error:
            if self.size == 1 or not is_communication_error(error):
                raise
            raise ProcessGroupError(f"{doing}: {first_sentence(error)}") from error

    def missing(self) -> list[int]:
        """Ranks that do not answer any more; called by those that have noticed that the job is broken.

        Empty where that cannot be told: the store has gone with the machine that kept it, or the network to it has.
        """
        found: list[list[int]] = []

        def ask() -> None:
            limit, missing = time.monotonic() + LAST_WORDS, list(range(self.size))
            with suppress(RuntimeError):
                self.store.set(f"here/{self.rank}", str(os.getpid()))
                while missing and time.monotonic() < limit:
                    missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
                    time.sleep(0.05)
                found.append(missing)

        # A store behind a cut cable does not answer for many minutes, whatever time-out it was given.
        asking = threading.Thread(target=ask, name="asking who is there", daemon=True)
        asking.start()
        asking.join(2 * LAST_WORDS)
        return found[0] if found else []


@contextmanager
def join(device: torch.device, timeout: float = TIMEOUT) -> Iterator[Processes]:
    """Take part in the job that torchrun has started; a process on its own is a job of one.

    Args:
        device: of this process; GPUs exchange over NCCL, CPUs over gloo.
        timeout: seconds that one process waits for the others.

    Raises:
        ProcessGroupError: another process ended or did not answer in time; says which.
    """
    place = Place.of_this_process()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.size == 1:
        yield Processes(place, timeout=timeout)
        return
    processes = _meet(place, device, timeout)
    try:
        with processes.pulse:
            yield processes
    except ProcessGroupError as error:
        missing = processes.missing()
        who = f"process {', '.join(map(str, missing))}" if missing else "a process"
        raise ProcessGroupError(
            f"{who} of {place.size} ended or does not answer, so this one (rank {place.rank}) cannot go on: {error}. "
            f"Look for the other's own message"
        ) from error
    dist.destroy_process_group()


def _meet(place: Place, device: torch.device, timeout: float) -> Processes:
    """Find the other processes, through torchrun's store where it keeps one, else through one that rank 0 opens."""
    host, port, limit = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], timedelta(seconds=timeout)
    kept, store_name = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", f"mit_semseg/{place.restarts}"
    try:
        tcp = dist.TCPStore(host, int(port), place.size, is_master=place.rank == 0 and not kept, timeout=limit)
        store = dist.PrefixStore(store_name, tcp)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=limit)
        own = dist.PrefixStore(store_name, dist.TCPStore(host, int(port), timeout=limit))
        return Processes(place, store, timeout, Pulse(own, place.rank, place.size, timeout))
    except RuntimeError as error:
        raise ProcessGroupError(
            f"rank {place.rank} could not meet the other {place.size - 1} processes at {host}:{port} "
            f"({first_sentence(error)}); on several machines GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the "
            f"network interface"
        ) from error


@contextmanager
def first_on_machine(processes: Processes) -> Iterator[None]:
    """Let the first process of every machine do something (a download) before the others do."""
    doing = "waiting for the first process of the machine"
    if processes.place.local_rank:
        processes.collect(None, doing, patient=True)
    yield
    if not processes.place.local_rank:
        processes.collect(None, doing, patient=True)


def parallel(module: nn.Module, devices: Sequence[torch.device], processes: Processes) -> UserScatteredDataParallel:
    """A module that takes a list with one batch per device of this process, and runs in step with the other processes.

    Args:
        module: on the first of the devices; the parameters of rank 0 count.
        devices: of this process; one only, where there are several processes.

    Raises:
        UserError: several devices in this process, and blocks that are recomputed or compiled.
        ValueError: several devices in several processes.
    """
    for done in ("recomputed", "compiled") if len(devices) > 1 else ():
        if any(getattr(part, done, False) for part in module.modules()):
            raise UserError(
                f"TRAIN.{done.removesuffix('d')} does not work with several devices of one process: start a process "
                f"per device (torchrun --nproc_per_node=...), or leave it out"
            )
    if processes.size == 1:
        return UserScatteredDataParallel(module, devices, timeout=processes.timeout)
    if len(devices) > 1:
        raise ValueError(f"with {processes.size} processes each drives one device, not {len(devices)}")
    # Synchronized statistics are the same everywhere; others are shared when they are needed, see `share_buffers`. The
    # option has had two names.
    for name, part in module.named_modules():
        if isinstance(part, SynchronizedBatchNorm):
            part.join(None, name=name)
    new, old = "forward_sync_buffers", "broadcast_buffers"
    option = new if new in signature(DistributedDataParallel).parameters else old
    with processes.waiting("comparing the networks"):
        module = DistributedDataParallel(module, **{option: False})
    return UserScatteredDataParallel(module, devices)


def share_buffers(module: nn.Module, processes: Processes) -> None:
    """Give all processes the first one's buffers: norms that are not synchronized have learnt others in each."""
    if processes.size > 1:
        with processes.waiting("sharing running estimates"):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def gradient_exchange(runner: UserScatteredDataParallel, wanted: bool):
    """Context in which the gradients of a backward pass are exchanged between processes, or only gathered here."""
    module = runner.module
    return nullcontext() if wanted or not isinstance(module, DistributedDataParallel) else module.no_sync()
