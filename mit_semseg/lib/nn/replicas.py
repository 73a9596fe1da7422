"""How the replicas of one process, and the processes of a group, meet to share statistics.

Replicas are threads that meet at a `ReplicaGroup`; processes meet in collectives of `torch.distributed`. Whoever waits
does so for a bounded time, and says at which layer.
"""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..utils import UserError


class ReplicaError(UserError, RuntimeError):
    """A replica could not go on because another one failed or did not arrive."""


class ProcessGroupError(UserError, RuntimeError):
    """A process could not go on because another one ended or did not answer in time."""


class ReplicaGroup:
    """SyncStatistics point of the replicas of a module during one forward pass.

    Args:
        size: number of replicas.
        timeout: seconds a replica waits for the others before it raises.
    """

    def __init__(self, size: int, timeout: float = 120.0):
        self.size, self.timeout, self.stopped = size, timeout, False
        self._barrier = threading.Barrier(size, timeout=timeout)
        self._given: list = [None] * size
        self._results: list = []

    def together(self, rank: int, name: str, value, work: Callable[[list], list]):
        """Hand in a value; replica 0 works on the values of all, and each gets its part of the result.

        Args:
            rank: of this replica.
            name: of the layer; all replicas must come from the same one.
            value: handed in by this replica.
            work: from the values of all replicas, in the order of their ranks, to as many results. Only replica 0's is
                called.

        Raises:
            ReplicaError: another replica failed, or did not arrive in time.
            RuntimeError: the replicas came from different layers.
        """
        self._given[rank] = name, value
        self._wait(rank, name)
        if rank == 0:
            try:
                self._check_names()
                self._results = work([value for _, value in self._given])
            except BaseException:
                self.stop()
                raise
            finally:
                self._given = [None] * self.size
        self._wait(rank, name)
        return self._results[rank]

    def stop(self) -> None:
        """Wake everybody who waits, now and later, with `ReplicaError`: a replica has failed."""
        self.stopped = True
        self._barrier.abort()

    def _wait(self, rank: int, name: str) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            late = ", ".join(str(i) for i, given in enumerate(self._given) if given is None) or "0"
            reason = (
                "another one failed" if self.stopped else f"replica {late} did not arrive within {self.timeout:g} s"
            )
            raise ReplicaError(f"{name}: replica {rank} of {self.size} waited for the others, but {reason}") from None

    def _check_names(self) -> None:
        names = [name for name, _ in self._given]
        if len(set(names)) > 1:
            places = ", ".join(f"replica {i} at {name}" for i, name in enumerate(names))
            raise RuntimeError(f"the replicas went different ways through the network: {places}")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes of a group (None: the default group), 1 where `torch.distributed` is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_gather_rows(vector: Tensor, group: dist.ProcessGroup | None, name: str) -> Tensor:
    """Vectors of all processes.

    Args:
        vector: (n,), of the same length everywhere.
        group: process group, None for the default one.
        name: of the layer, for the error.

    Returns:
        (processes, n), in the order of the ranks, the same on all processes.

    Raises:
        ProcessGroupError: a process ended or did not answer within the group's time-out (gloo; NCCL works in the
            background, and ends the process itself).
    """
    if world_size(group) == 1:
        return vector.unsqueeze(0)
    rows = [torch.empty_like(vector) for _ in range(world_size(group))]
    _collective(lambda: dist.all_gather(rows, vector.contiguous(), group=group), group, name)
    return torch.stack(rows)


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None, name: str) -> Tensor:
    """Sum of a tensor over all processes, in place; arguments and errors as of `all_gather_rows`."""
    if world_size(group) > 1:
        _collective(lambda: dist.all_reduce(tensor, group=group), group, name)
    return tensor


def first_sentence(error: BaseException) -> str:
    """What an error says, without the rest of its report."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".")


def is_communication_error(error: BaseException) -> bool:
    """Whether an error was raised by the communication with other processes, and not by this one, e.g. for lack of
    memory. gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _collective(call: Callable[[], object], group: dist.ProcessGroup | None, name: str) -> None:
    try:
        call()
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        raise ProcessGroupError(
            f"{name}: process {dist.get_rank(group)} of {dist.get_world_size(group)} waited for the others, but one "
            f"ended or did not answer in time ({first_sentence(error)})"
        ) from error
