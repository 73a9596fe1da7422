"""Communication between the replicas of a module; the replicas run in threads of one process."""

import threading
from collections.abc import Callable

from ..utils import UserError

DEFAULT_TIMEOUT = 120.0  # seconds


class ReplicaError(UserError, RuntimeError):
    """A replica was aborted because another replica failed or timed out."""


class ReplicaGroup:
    """Synchronizes the replicas of a module in one forward pass; every wait takes at most `timeout` seconds."""

    def __init__(self, size: int, timeout: float):
        self.size, self.timeout, self.stopped = size, timeout, False
        self._barrier = threading.Barrier(size, timeout=timeout)
        self._inputs: list = [None] * size
        self._results: list = []

    def gather_and_compute(self, index: int, layer_name: str, value, compute: Callable[[list], list]):
        """Call `compute` on replica 0 with the list of all replicas' values; return element `index` of the result.

        Raises ReplicaError if another replica failed or timed out.
        """
        self._inputs[index] = value
        self._wait(index, layer_name)
        if index == 0:
            try:
                self._results = compute(self._inputs)
            except BaseException:
                self.stop()
                raise
            finally:
                self._inputs = [None] * self.size
        self._wait(index, layer_name)
        return self._results[index]

    def stop(self) -> None:
        """Raise `ReplicaError` in all replicas that wait now or later."""
        self.stopped = True
        self._barrier.abort()

    def _wait(self, index: int, layer_name: str) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            missing = ", ".join(str(i) for i, value in enumerate(self._inputs) if value is None) or "0"
            timeout = f"replica {missing} timed out after {self.timeout:g} s"
            reason = "another replica failed" if self.stopped else timeout
            raise ReplicaError(f"{layer_name}: replica {index} of {self.size} was aborted because {reason}") from None
