"""Assign records to batches, and split a list of records into shards."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class OrientationBatches:
    """Endless sequence of batches. A batch is a tuple of record indices; all its images have the same orientation.

    In every pass over the dataset, the records are shuffled and put into two buckets: portrait, and landscape or
    square. When a bucket has `batch_size` records, they become a batch. Records left in the buckets are used in the
    next pass. Batch `i` depends only on the arguments and `i`, not on the number of workers or on a resume.

    Args:
        upright: one value per record, True if the image is higher than wide.
    """

    def __init__(self, upright: Sequence[bool], batch_size: int, seed: int = 0):
        if not len(upright):
            raise ValueError("cannot build batches: the dataset has no records")
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

    def __getitem__(self, index: int) -> tuple[int, ...]:
        """Return the record indices of batch `index` >= 0."""
        if index < self._first:  # in an earlier pass; start again from the first pass
            self._restart()
        while index >= self._first + len(self._batches):
            self._next_pass()
        return self._batches[index - self._first]


def shards(length: int, count: int) -> list[range]:
    """Split `range(length)` into `count` contiguous ranges whose lengths differ by at most one."""
    bounds = [length * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
