"""Which images form which batch: a function of the seed and the batch's number alone."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


class OrientationBatches:
    """Endless numbered batches of record indices, each of one orientation.

    The records are shuffled anew in every pass by (seed, pass), and go to two buckets, upright and lying; a full bucket
    is a batch. What is left in a bucket at the end of a pass opens the next, so that every pass takes every record
    exactly once. Batch `i` is the same whoever asks for it, in whatever order: any number of workers and a resumed run
    see the same sequence.

    Args:
        upright: for every record, whether its picture is higher than wide.
        batch_size: records per batch.
        seed: of the shuffles.

    Raises:
        ValueError: no records.
    """

    def __init__(self, upright: Sequence[bool], batch_size: int, seed: int = 0):
        if not len(upright):
            raise ValueError("there are no records to make batches of")
        self.upright = np.asarray(upright, bool)
        self.batch_size, self.seed = batch_size, seed
        self._restart()

    def _restart(self) -> None:
        self._pass, self._first, self._batches = -1, 0, []
        self._buckets: tuple[list[int], list[int]] = ([], [])

    def _next_pass(self) -> None:
        self._pass += 1
        self._first += len(self._batches)
        self._batches = []
        for record in np.random.default_rng((self.seed, self._pass)).permutation(len(self.upright)):
            bucket = self._buckets[int(self.upright[record])]
            bucket.append(int(record))
            if len(bucket) == self.batch_size:
                self._batches.append(tuple(bucket))
                bucket.clear()

    def __getitem__(self, number: int) -> tuple[int, ...]:
        """Record indices of batch `number` >= 0; going forward is cheap, going back starts at the first pass."""
        if number < 0:
            raise IndexError(f"batches are numbered from 0, got {number}")
        if number < self._first:
            self._restart()
        while number >= self._first + len(self._batches):
            self._next_pass()
        return self._batches[number - self._first]


class BatchNumbers:
    """Sampler that counts through batch numbers; of several devices each takes every n-th.

    Args:
        start, stop: range of rounds, as in `range`; in a round every device takes one batch.
        first, count: devices of this process, by their position among all.
        total: number of all devices.
    """

    def __init__(self, start: int, stop: int, first: int = 0, count: int = 1, total: int = 1):
        self.start, self.stop, self.first, self.count, self.total = start, stop, first, count, total

    def __iter__(self) -> Iterator[int]:
        own = range(self.first, self.first + self.count)
        return (turn * self.total + device for turn in range(self.start, self.stop) for device in own)

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.count


def shards(count: int, parts: int) -> list[range]:
    """`count` positions as `parts` contiguous ranges whose lengths differ by one at most (some may be empty)."""
    bounds = [count * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]
