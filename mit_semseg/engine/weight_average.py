"""Exponential moving average of the weights of a network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of the parameters and buffers of a network (Polyak & Juditsky, 1992).

    Update n = 1, 2, ... computes average = d * average + (1 - d) * weights with d = min(decay, (1 + n) / (10 + n)).
    The smaller d of the first updates removes the initial weights from the average. Integer buffers are copied.

    Args:
        module: network on its device; its current weights are the first average. The loss `crit` is left out.
        decay: decay d after the first updates, 0..1.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        weights = chain(module.named_parameters(), module.named_buffers())
        self._weights = {name: weight for name, weight in weights if not name.startswith("crit.")}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._floats = [name for name, weight in self._weights.items() if weight.is_floating_point()]
        self._integers = [name for name, weight in self._weights.items() if not weight.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        update = get_ema_multi_avg_fn(decay)
        update([self._averages[name] for name in self._floats], [self._weights[name] for name in self._floats], None)
        for name in self._integers:
            self._averages[name].copy_(self._weights[name])

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Context in which the network has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            value = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(value)

    def state(self) -> dict:
        """Return the state that `load_state` restores."""
        return {"updates": self.updates, "averages": self._averages}

    @torch.no_grad()
    def load_state(self, state: Mapping | None) -> None:
        """Restore the result of `state`; None starts again from the current weights."""
        state = state or {"updates": 0, "averages": self._weights}
        self.updates = state["updates"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])
