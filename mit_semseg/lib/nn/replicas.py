"""How the replicas of one process, and the processes of a group, meet to share statistics.

Replicas are threads that meet at a `ReplicaGroup`; processes meet in collectives of `torch.distributed`. Whoever waits
does so for a bounded time, and says at which layer.
"""

import threading
from collections.abc import Callable

from ..utils import UserError


class ReplicaError(UserError, RuntimeError):
    """A replica could not go on because another one failed or did not arrive."""


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
