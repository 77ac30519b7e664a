"""AdamW whose moments take one byte per value: torchao's AdamW8bit.

Values are quantised in blocks that share a scale (Dettmers et al., "8-bit optimizers via block-wise quantization",
2022). Here blocks never cross a row: codes (rows, columns) and scales (rows, columns / block) are sharded as the matrix
is, and a checkpoint of them is read in any other layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm.train.optim.mixed import Mixed
from llm.utils.config import ConfigError, TrainConfig
from llm.utils.sharding import like, local

BLOCK = 64  # values of a row that share a scale
FEWEST = 4096  # values of a matrix that is worth it
SLOTS = {"exp_avg": True, "exp_avg_sq": False}  # is it signed?


class AdamW8bit(Mixed):
    """torchao's AdamW8bit for matrices whose columns are a multiple of 64, AdamW for what is left. No communication.

    Keeps 2.125 bytes for each value of the former. With train.compile its update is compiled. Raises ConfigError where
    torchao is missing, and where tensor parallelism cuts blocks apart.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, scales: Mapping[str, float] | None = None
    ) -> None:
        try:
            from torchao.optim import AdamW8bit as Torchao
            from torchao.optim.subclass_8bit import OptimState8bit
        except ImportError as error:
            raise ConfigError(
                f"train.optimizer=adamw8bit needs torchao ({error}): pip install 'llmops[lowmem]'"
            ) from error
        super().__init__(parameters, {name for name, p in parameters.items() if quantised(p)}, config, scales)
        self.codes: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS}
        self.block_scales: dict[str, dict[str, Tensor]] = {slot: {} for slot in SLOTS}
        states: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            # torchao sees this rank's shards alone, as plain parameters that share memory with ours.
            shards = {name: nn.Parameter(local(p)) for name, p in self.matrices.items()}
        for name, shard in shards.items():
            if shard.shape[1] % BLOCK:
                raise ConfigError(
                    f"train.optimizer=adamw8bit: a rank has {shard.shape[1]} columns of {name}, which are no blocks of "
                    f"{BLOCK}: lower dist.tp, or choose train.optimizer=adamw"
                )
            for slot, signed in SLOTS.items():
                if not shard.numel():  # torchao has no such states
                    self.codes[slot][name] = torch.zeros(shard.shape, dtype=torch.uint8, device=shard.device)
                    self.block_scales[slot][name] = torch.zeros(0, device=shard.device)
                    continue
                moment = OptimState8bit.zeros(shard.shape, signed, BLOCK, shard.device, dtype=shard.dtype)
                self.codes[slot][name], self.block_scales[slot][name] = moment.codes, moment.scale
                states.setdefault(name, {"step": torch.tensor(0.0)})[slot] = moment
        self.shards = {name: shards[name] for name in states}  # those with values
        groups = [{"params": [shard], "weight_decay": config.weight_decay} for shard in self.shards.values()]
        self.torchao: Any = None
        if groups:
            self.torchao = Torchao(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
            for name, state in states.items():
                self.torchao.state[self.shards[name]] = state

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient and values on this rank."""
        if self.torchao is not None:
            for (name, shard), group in zip(self.shards.items(), self.torchao.param_groups, strict=True):
                gradient = self.matrices[name].grad
                shard.grad = None if gradient is None else local(gradient)
                scale = self.scales.get(name, 1.0)
                group["lr"].fill_(lr * scale)
                group["weight_decay"] = self.config.weight_decay / scale  # as AdamW has it
                self.torchao.state[shard]["step"].fill_(self.steps)
            # torchao always compiles its update, which takes a C++ compiler on CPUs and a minute: only where asked for.
            with torch.compiler.set_stance("default" if self.config.compile else "force_eager"):
                self.torchao.step()
            for shard in self.shards.values():
                shard.grad = None
        self.rest.step(lr)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, weights included, by canonical name. What is in it is updated in place.

        Quantised moments are two tensors each, ``NAME:codes`` and ``NAME:scale``.
        """
        found = self.rest.state()
        with torch.no_grad():
            for name, parameter in self.matrices.items():
                found[f"model.{name}"] = parameter.detach()
                for slot in SLOTS:
                    codes, scale = self.codes[slot][name], self.block_scales[slot][name]
                    found[f"optim.{slot}.{name}:codes"] = like(codes, parameter)
                    scale = scale.view(codes.shape[0], codes.shape[1] // BLOCK)
                    found[f"optim.{slot}.{name}:scale"] = _like_narrow(scale, parameter)
        return found


def quantised(parameter: Tensor) -> bool:
    """Does the whole ``parameter``, whatever the layout, have moments of one byte?"""
    return parameter.dim() == 2 and parameter.numel() >= FEWEST and parameter.shape[1] % BLOCK == 0


def _like_narrow(data: Tensor, whole: Tensor) -> Tensor:
    """``data`` (rows, columns / block) of this rank, spread as ``whole`` (rows, columns) is."""
    mesh = getattr(whole, "device_mesh", None)
    if mesh is None:
        return data
    from torch.distributed.tensor import DTensor

    spread: Any = whole
    columns = whole.shape[1] // BLOCK
    shape, stride = torch.Size((whole.shape[0], columns)), (columns, 1)
    return DTensor.from_local(data, mesh, spread.placements, run_check=False, shape=shape, stride=stride)
