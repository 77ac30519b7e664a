"""Initial weights: the same values for the same seed, whatever the number of ranks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from llm.utils.sharding import local, place

EMBEDDING_STD = 0.02


def init_weights(model: nn.Module, seed: int, n_layers: int) -> None:
    """Fill every parameter in place; sharded parameters get their slice of the full tensor.

    Each tensor has its own generator, keyed by its name, on the CPU: neither the number of ranks, nor the order of
    modules, nor the kind of device changes a value. Costs the memory of the largest tensor.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = initial_value(name, tuple(parameter.shape), seed, n_layers)
            begin, end = place(parameter)
            local(parameter).copy_(full[begin:end])


def initial_value(name: str, shape: tuple[int, ...], seed: int, n_layers: int) -> Tensor:
    """The full float32 tensor that ``name`` starts from.

    Matrices: normal with 1/sqrt(fan-in). The two that write into the residual stream are smaller by sqrt(2 x layers),
    so that the stream's variance does not grow with depth. Norm weights: one.
    """
    full = torch.ones(shape)
    if full.dim() < 2:
        return full
    std = EMBEDDING_STD if name == "embedding.weight" else shape[1] ** -0.5  # a linear weight is (out, in)
    if name.endswith(("attention.wo.weight", "ffn.down.weight")):
        std /= (2 * n_layers) ** 0.5
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)  # a signed 64-bit seed
    return full.normal_(0.0, std, generator=generator)
