"""AdamW.

torch.optim is not used: building any of its optimizers imports torch's compiler, a second or more of every start and
restart, and its update sends each sharded tensor through DTensor's dispatch. This one calls the same fused kernel as
torch.optim.AdamW(fused=True), once for all of a rank's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llm.utils.config import TrainConfig
from llm.utils.sharding import like, local


class AdamW:
    """Decoupled weight decay on matrices, none on norm weights. Works on each rank's rows alone: no communication.

    ``exp_avg`` and ``exp_avg_sq`` hold this rank's rows for each parameter's name. Build it after the model is sharded.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.config = config
        self.steps = 0  # updates so far
        self.parameters = dict(parameters)
        with torch.no_grad():
            self.exp_avg = {name: torch.zeros_like(local(p)) for name, p in self.parameters.items()}
            self.exp_avg_sq = {name: torch.zeros_like(local(p)) for name, p in self.parameters.items()}

    def gradients(self) -> list[Tensor]:
        """This rank's rows of every gradient."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient and rows on this rank."""
        self.steps += 1
        for decay, names in self._groups():
            parameters = [local(self.parameters[name]) for name in names]
            count = torch.tensor(float(self.steps), device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [local(grad) for name in names if (grad := self.parameters[name].grad) is not None],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                [],  # maxima, for amsgrad only
                [count] * len(names),
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=decay,
                eps=self.config.eps,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Drop the gradients and their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, weights included, by canonical name. What is in it is updated in place."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                found[f"model.{name}"] = parameter.detach()
                found[f"optim.exp_avg.{name}"] = like(self.exp_avg[name], parameter)
                found[f"optim.exp_avg_sq.{name}"] = like(self.exp_avg_sq[name], parameter)
        return found

    def _groups(self) -> Iterator[tuple[float, list[str]]]:
        """Names with and without weight decay; a parameter of few rows may have none on this rank."""
        live = {n: p for n, p in self.parameters.items() if p.grad is not None and self.exp_avg[n].numel()}
        for decay, wanted in ((self.config.weight_decay, True), (0.0, False)):
            if names := [name for name, p in live.items() if (p.dim() >= 2) is wanted]:
                yield decay, names


def clip_coefficient(norm: float, limit: float) -> float:
    """What to multiply gradients of global ``norm`` by, so that it does not exceed ``limit`` (0 = no limit)."""
    return 1.0 if limit == 0 or norm <= limit else limit / norm
