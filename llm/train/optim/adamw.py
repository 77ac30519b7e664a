"""AdamW (Loshchilov and Hutter, 2019), by the same fused kernel as torch.optim.AdamW(fused=True)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llm.utils.config import TrainConfig
from llm.utils.sharding import like, local


class AdamW:
    """Decoupled weight decay on matrices, none on norms and biases. Needs no communication: shards are independent.

    ``exp_avg`` and ``exp_avg_sq`` hold this rank's part for each parameter's name. ``scales`` multiply the learning
    rate of single parameters, and not what decays: rate x decay is the same for all.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, scales: Mapping[str, float] | None = None
    ) -> None:
        self.config, self.scales = config, scales or {}
        self.steps = 0  # updates so far
        self.parameters = dict(parameters)
        with torch.no_grad():
            self.exp_avg = {name: torch.zeros_like(local(p)) for name, p in self.parameters.items()}
            self.exp_avg_sq = {name: torch.zeros_like(local(p)) for name, p in self.parameters.items()}

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient and values on this rank; one kernel for all that are alike."""
        self.steps += 1
        for (decay, scale), names in self._groups().items():
            parameters = [local(self.parameters[name]) for name in names]
            count = torch.tensor(float(self.steps), device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [local(grad) for name in names if (grad := self.parameters[name].grad) is not None],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                [],  # maxima, for amsgrad only
                [count] * len(names),
                lr=lr * scale,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=decay / scale,
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

    def _groups(self) -> dict[tuple[float, float], list[str]]:
        """Names by weight decay and scale of the learning rate; a small parameter may have no values on this rank."""
        found = defaultdict(list)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and self.exp_avg[name].numel():
                decay = self.config.weight_decay if parameter.dim() >= 2 else 0.0
                found[decay, self.scales.get(name, 1.0)].append(name)
        return found
