"""Optimizers, by the name that ``train.optimizer`` has for them.

torch.optim is not used: building any of its optimizers imports torch's compiler, a second or more of every start and
restart, and its updates send each sharded tensor through DTensor's dispatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from llm.model.init import lr_scale
from llm.registry import Registry
from llm.train.lora import trained
from llm.utils.config import ModelConfig, TrainConfig


class Optimizer(Protocol):
    """What a training step needs of one. It works on each rank's own shards; ``step`` is called on all ranks."""

    steps: int  # updates so far; set after a checkpoint is loaded

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient."""

    def zero_grad(self) -> None:
        """Drop the gradients and their memory."""

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, weights included, by canonical name. What is in it is updated in place."""


# Each is made from the parameters by name, the config, and by name what multiplies the learning rate.
OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "llm.train.optim.adamw:AdamW",
        "adamw8bit": "llm.train.optim.low_memory:AdamW8bit",
        "muon": "llm.train.optim.muon:Muon",
    },
)


def build(parameters: Mapping[str, nn.Parameter], train: TrainConfig, model: ModelConfig) -> Optimizer:
    """The optimizer of a run, after the model is sharded. What is frozen has no part in it."""
    parameters = trained(parameters)
    scales = {name: lr_scale(name, tuple(parameter.shape), model) for name, parameter in parameters.items()}
    made: Optimizer = OPTIMIZERS.load(train.optimizer)(parameters, train, scales)
    return made


def clip_coefficient(norm: float, limit: float) -> float:
    """What to multiply gradients of global ``norm`` by, so that it does not exceed ``limit`` (0 = no limit)."""
    return 1.0 if limit == 0 or norm <= limit else limit / norm
