"""Initial weights: the same values for the same seed, whatever the number of ranks.

Two sets of rules (``model.init``):

- ``depth_scaled``: matrices get 1/sqrt(fan-in), the two that write into the residual stream less by sqrt(2 x layers),
  as GPT-2 has it, so that the stream's variance does not grow with depth.
- ``mup``: the same at width ``mup_base_dim``, and other widths follow from it such that activations and updates keep
  their size, so that a learning rate found on a narrow model fits a wide one (Yang et al., "Tensor Programs V", 2022,
  table 8). Three rules are elsewhere: attention's scale, the scale of the logits (:mod:`llm.model.layers`,
  :mod:`llm.model.transformer`), and each parameter's learning rate, :func:`lr_scale`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llm.utils.config import ModelConfig
from llm.utils.sharding import local, slices

EMBEDDING_STD = 0.02
INTO_THE_STREAM = ("attention.wo.weight", "ffn.down.weight")


def init_weights(model: nn.Module, seed: int, config: ModelConfig) -> None:
    """Fill every parameter in place; sharded parameters get their slice of the full tensor.

    Each tensor has its own generator, keyed by its name, on the CPU: neither the number of ranks, nor the order of
    modules, nor the kind of device changes a value. Costs the memory of the largest tensor.
    """
    init_parameters(dict(model.named_parameters()), seed, config)


@torch.no_grad()
def init_parameters(parameters: Mapping[str, nn.Parameter], seed: int, config: ModelConfig) -> None:
    """The same for some parameters, by name."""
    for name, parameter in parameters.items():
        full = initial_value(name, tuple(parameter.shape), seed, config)
        local(parameter).copy_(full[slices(parameter)])


def initial_value(name: str, shape: tuple[int, ...], seed: int, config: ModelConfig) -> Tensor:
    """The full float32 tensor that ``name`` starts from: normal for matrices, one for norms, zero for biases
    and for the second half of an adapter (:mod:`llm.train.lora`)."""
    if name.endswith(".lora_b"):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    if config.tie_embeddings and name == "head.weight":
        name = "embedding.weight"  # on the last stage of a pipeline
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)  # a signed 64-bit seed
    return torch.empty(shape).normal_(0.0, standard_deviation(name, shape, config), generator=generator)


def standard_deviation(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    """Of the matrix ``name`` (out, in)."""
    if name == "embedding.weight":
        return EMBEDDING_STD
    if name == "head.weight" and config.init == "mup":
        return float(config.mup_base_dim**-0.5)  # at every width: the logits are scaled instead
    std = float(shape[1] ** -0.5)
    return std / (2 * config.n_layers) ** 0.5 if name.endswith(INTO_THE_STREAM) else std


def lr_scale(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    """What the learning rate of ``name`` is multiplied by under Adam: 1, or less for muP's wide matrices."""
    hidden = len(shape) >= 2 and name not in ("embedding.weight", "head.weight")
    return config.mup_base_dim / config.dim if config.init == "mup" and hidden else 1.0
