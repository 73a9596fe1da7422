"""Which images form which batch: a function of the seed and the batch's number alone."""

from collections.abc import Iterator, Sequence

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
    """Sampler that counts from one batch number to another; with several processes each takes every n-th.

    Args:
        start, stop: range of steps, as in `range`.
        rank, world_size: of this process.
    """

    def __init__(self, start: int, stop: int, rank: int = 0, world_size: int = 1):
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __iter__(self) -> Iterator[int]:
        return (step * self.world_size + self.rank for step in range(self.start, self.stop))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)
