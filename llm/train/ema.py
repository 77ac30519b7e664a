"""A moving average of the weights, which often does better on held-out text than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llm.utils.sharding import like, local


class MovingAverage:
    """``average = decay x average + (1 - decay) x weight`` after every update, in float32, on each rank's own shards.

    Costs 4 bytes per parameter that a rank holds, and one pass over them per step (Polyak and Juditsky, 1992).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        with torch.no_grad():
            self.average = {name: torch.empty_like(local(p), dtype=torch.float32) for name, p in parameters.items()}

    @torch.no_grad()
    def start(self) -> None:
        """Take the weights as they are."""
        for name, parameter in self.parameters.items():
            self.average[name].copy_(local(parameter))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights."""
        mine = [local(parameter).float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), mine, 1.0 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the place of the weights, such as for an evaluation. One tensor at a time is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            weight, average = local(parameter), self.average[name]
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the averages, spread as the weights are."""
        with torch.no_grad():
            return {f"ema.{name}": like(self.average[name], p) for name, p in self.parameters.items()}
