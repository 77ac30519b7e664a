"""What optimizers share that treat some matrices in their own way and leave the rest to AdamW."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from llm.train.optim.adamw import AdamW
from llm.utils.config import TrainConfig
from llm.utils.sharding import local


class Mixed:
    """``matrices`` are this optimizer's own, by name; ``rest`` updates all others."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        own: set[str],
        config: TrainConfig,
        scales: Mapping[str, float] | None,
    ) -> None:
        self.config, self.scales = config, scales or {}
        self.matrices = {name: p for name, p in parameters.items() if name in own}
        self.rest = AdamW({name: p for name, p in parameters.items() if name not in own}, config, scales)

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self.rest.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.rest.steps = value

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""
        return [local(p.grad) for p in self.matrices.values() if p.grad is not None] + self.rest.gradients()

    def zero_grad(self) -> None:
        """Drop the gradients and their memory."""
        for parameter in self.matrices.values():
            parameter.grad = None
        self.rest.zero_grad()
