"""Assign records to batches, and split a list of records into shards."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np


class OrientationBatches:
    """Endless sequence of batches. A batch is a tuple of record indices; all its images have the same orientation.

    In every pass over the dataset, the records are shuffled, or drawn by `draw`, and put into two buckets: portrait,
    and landscape or square. When a bucket has `batch_size` records, they become a batch. Records left in the buckets
    are used in the next pass. Batch `i` depends only on the arguments and `i`, not on workers or on a resume.

    Args:
        upright: one value per record, True if the image is higher than wide.
        draw: function of a generator that returns the record indices of a pass; None: a random permutation.
    """

    def __init__(
        self,
        upright: Sequence[bool],
        batch_size: int,
        seed: int = 0,
        *,
        draw: Callable[[np.random.Generator], np.ndarray] | None = None,
    ):
        if not len(upright):
            raise ValueError("cannot build batches: the dataset has no records")
        self.upright = np.asarray(upright, bool)
        self.batch_size, self.seed = batch_size, seed
        self._draw = draw or self._shuffle
        self._restart()

    def _restart(self) -> None:
        self._pass, self._first, self._batches = -1, 0, []
        self._buckets: tuple[list[int], list[int]] = ([], [])

    def _shuffle(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.upright))

    def _next_pass(self) -> None:
        self._pass += 1
        self._first += len(self._batches)
        self._batches = []
        for record in self._draw(np.random.default_rng((self.seed, self._pass))):
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


def class_probabilities(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probability (classes,) with which a class is drawn: softmax((1 - f) / temperature).

    See Hoyer et al., "DAFormer", 2022. f is the fraction of all labelled pixels that have the class. Classes without
    pixels have probability 0. `counts` (records, classes) is the result of `class_counts`.
    """
    pixels = counts.sum(0)
    rarity = np.where(pixels > 0, 1 - pixels / max(pixels.sum(), 1), -np.inf)
    weights = np.exp((rarity - rarity.max()) / temperature)
    return weights / weights.sum()


def draw_by_class(present: np.ndarray, probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw as many record indices as there are records: for each, a class, and then one of the records that have it.

    Args:
        present: (records, classes) bool, whether a record has pixels of a class.
        probabilities: probability of every class, see `class_probabilities`.
    """
    classes = rng.choice(len(probabilities), len(present), p=probabilities)
    holders = {number: np.flatnonzero(present[:, number]) for number in np.unique(classes)}
    return np.array([rng.choice(holders[number]) for number in classes])


def shards(length: int, count: int) -> list[range]:
    """Split `range(length)` into `count` contiguous ranges whose lengths differ by at most one."""
    bounds = [length * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
