"""Work that goes on in the background: writing results while the network has the next picture."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

BACKLOG = 4  # pieces of work that may wait, each with a picture in memory


class Background:
    """Does pieces of work one after the other in a thread; leaving it waits for all of them.

    What goes wrong is raised by a later call or at the end, and what is then left is not begun.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> "Background":
        return self

    def __call__(self, work: Callable[[], object]) -> None:
        """Have something done; waits while there is too much to do already."""
        while len(self._waiting) >= BACKLOG or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def __exit__(self, kind, *_) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
