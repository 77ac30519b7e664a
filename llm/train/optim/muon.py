"""Muon: momentum whose directions all get the same length (Jordan et al., kellerjordan.github.io/posts/muon, 2024).

The matrices of the blocks get it; embedding, output matrix, norms and biases are AdamW's. Updates are scaled to the
size of AdamW's, so that both share a learning rate and weight decay (Liu et al., "Muon is scalable for LLM training",
2025, section 2.2). State: 4 bytes per value of a matrix instead of AdamW's 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.train.optim.mixed import Mixed
from llm.utils.config import TrainConfig
from llm.utils.sharding import like, local, slices

# Of the fifth-order polynomial that is applied again and again: steep at 0, and near 1 for singular values up to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_SIZE = 0.2  # root mean square of a usual update of AdamW, in learning rates


class Muon(Mixed):
    """Needs whole matrices: ranks that share their shards gather them, and each works out some of them for all."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, scales: Mapping[str, float] | None = None
    ) -> None:
        own = {name for name, p in parameters.items() if name.startswith("blocks.") and p.dim() == 2}
        super().__init__(parameters, own, config, scales)
        with torch.no_grad():
            self.momentum = {name: torch.zeros_like(local(p)) for name, p in self.matrices.items()}

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, weights included, by canonical name. What is in it is updated in place."""
        found = self.rest.state()
        with torch.no_grad():
            for name, parameter in self.matrices.items():
                found[f"model.{name}"] = parameter.detach()
                found[f"optim.momentum.{name}"] = like(self.momentum[name], parameter)
        return found

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient."""
        names = [name for name, parameter in self.matrices.items() if parameter.grad is not None]
        group = _sharing(next(iter(self.matrices.values()))) if names else None
        size = 1 if group is None else dist.get_world_size(group)
        for begin in range(0, len(names), size):
            self._update(names[begin : begin + size], group, lr)
        self.rest.step(lr)

    def _update(self, names: list[str], group: dist.ProcessGroup | None, lr: float) -> None:
        """Of ``names`` each rank of ``group`` works one out; all get all."""
        rank = 0 if group is None else dist.get_rank(group)
        mine: Tensor | None = None
        for owner, name in enumerate(names):
            whole = _whole(self._direction(name), self.matrices[name])
            if owner == rank:
                mine = orthogonal(whole)
        for owner, name in enumerate(names):
            parameter = self.matrices[name]
            update = mine if owner == rank else None
            if update is None:
                update = torch.empty(parameter.shape, device=parameter.device)
            if group is not None:
                dist.broadcast(update, group=group, group_src=owner)
            # A wide matrix's update is longer by the root of its width only, not by its width as AdamW's is.
            rate = lr * self.scales.get(name, 1.0) ** 0.5
            size = ADAMW_SIZE * max(parameter.shape) ** 0.5
            values = local(parameter)
            values.mul_(1 - lr * self.config.weight_decay)
            values.sub_(update[slices(parameter)], alpha=rate * size)

    def _direction(self, name: str) -> Tensor:
        """This rank's part of the momentum, looked at one step ahead (Nesterov)."""
        gradient: Any = self.matrices[name].grad
        part, momentum = local(gradient), self.momentum[name]
        momentum.mul_(self.config.muon_momentum).add_(part)
        return part.add(momentum, alpha=self.config.muon_momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """Float32, nearly U V^T of ``matrix`` = U S V^T, by five Newton-Schulz iterations: singular values 0.7 to 1.2.

    Worked out in bfloat16 on a GPU, which is enough for that, and in float32 on a CPU.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / (x.norm() + 1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float().contiguous()


def _sharing(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which FSDP shards ``parameter``; ranks of other axes work out the same beside them."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    group: dist.ProcessGroup | None = None if mesh is None else mesh.get_group("dp_shard")
    return group


def _whole(part: Tensor, parameter: Tensor) -> Tensor:
    """The matrix of which every rank has the ``part`` that it has of ``parameter``."""
    spread: Any = like(part, parameter)
    whole: Tensor = spread.full_tensor() if hasattr(spread, "full_tensor") else part
    return whole
