"""Signs of life between the processes of a job, for waits of which nobody knows how long they may be."""

import threading
import time
from contextlib import suppress

import torch.distributed as dist

BEATS = 8  # within the patience
LAST_WORDS = 2.0  # seconds that the store has for its last answer


class Pulse:
    """Tells the other processes now and then that this one is there, and notices when one of them falls silent: it was
    stopped, or the network to it or to the store is cut. While it is entered it does so in a thread.

    Args:
        store: of this alone, as one that does not answer holds up whoever asks.
        rank, size: of this process and of the job.
        patience: seconds of silence after which a process counts as gone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float):
        self._store, self._rank, self._patience = store, rank, patience
        self._others = [other for other in range(size) if other != rank]
        self._heard = dict.fromkeys(self._others, time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join(LAST_WORDS)

    def silent(self) -> list[int]:
        """Ranks that have not been heard of for longer than the patience."""
        return [other for other in self._others if time.monotonic() - self._heard[other] > self._patience]

    def _beat(self) -> None:
        count, said = 0, dict.fromkeys(self._others, b"")
        with suppress(RuntimeError):  # the store has gone: nobody is heard of any more
            while not self._ended.wait(self._patience / BEATS):
                count += 1
                self._store.set(f"pulse/{self._rank}", str(count))
                for other in self._others:
                    if (
                        self._store.check([f"pulse/{other}"])
                        and (word := self._store.get(f"pulse/{other}")) != said[other]
                    ):
                        said[other], self._heard[other] = word, time.monotonic()
