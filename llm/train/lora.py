"""Low-rank adapters beside the matrices of a frozen model (Hu et al., "LoRA", 2021), added from outside.

A matrix W (out, in) becomes W + scale x B A, with A ``lora_a`` (rank, in) and B ``lora_b`` (out, rank). B starts at
zero, so training starts from the model as it is. There is no dropout: where it would be needed, a lower rank or fewer
steps do the same, and every step stays a function of the weights and the batch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.transformer import Transformer
from llm.utils.config import LoraConfig

A, B = "lora_a", "lora_b"


def is_adapter(name: str) -> bool:
    """Is the parameter of this name one of an adapter?"""
    return name.endswith((f".{A}", f".{B}"))


def trained(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those that are not frozen: they alone have gradients, optimizer state and a place in checkpoints."""
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def add_adapters(model: Transformer, lora: LoraConfig) -> None:
    """Freeze ``model`` and put adapters, unfilled, beside its ``lora.targets``. Does nothing for rank 0.

    After tensor parallelism and before FSDP: an adapter is split as its matrix is. Of a matrix that is split by rows,
    so is B, and A is whole on every rank; of one that is split by columns, so is A, and B is whole. Either way a rank
    works on what it has of its matrix' input and output, and nothing more is exchanged.
    """
    if not lora.rank:
        return
    model.requires_grad_(False)
    for block in model.blocks.values():
        for part in (block.attention, block.ffn):
            for name in lora.targets:
                if (linear := getattr(part, name, None)) is not None:
                    _adapt(linear, lora)


def _adapt(linear: nn.Linear, lora: LoraConfig) -> None:
    device = linear.weight.device
    linear.register_parameter(A, _like(torch.empty(lora.rank, linear.in_features, device=device), linear.weight, 1))
    linear.register_parameter(B, _like(torch.empty(linear.out_features, lora.rank, device=device), linear.weight, 0))
    adapted = _adapted_part if hasattr(linear.weight, "device_mesh") else _adapted
    linear.forward = partial(adapted, linear, linear.forward, lora.scale)  # type: ignore[method-assign]


def _like(values: Tensor, weight: Tensor, dim: int) -> nn.Parameter:
    """A parameter that is split along ``dim`` if ``weight`` is, and else whole."""
    if not hasattr(weight, "device_mesh"):
        return nn.Parameter(values)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    spread: Any = weight
    placement = Shard(dim) if spread.placements[0].is_shard(dim) else Replicate()
    return nn.Parameter(distribute_tensor(values, spread.device_mesh, [placement]))


def _adapted(linear: Any, base: Callable[[Tensor], Tensor], scale: float, x: Tensor) -> Tensor:
    """The output (..., out) of ``linear`` and its adapter for ``x`` (..., in)."""
    return base(x) + F.linear(F.linear(x, linear.lora_a) * scale, linear.lora_b)


def _adapted_part(linear: Any, base: Callable[[Tensor], Tensor], scale: float, x: Any) -> Any:
    """The same where ``linear`` is split over ranks, and ``x`` and the output are DTensors.

    Of a matrix that is split by columns each rank has a part of a sum, and of the adapter too: they share a reduction.
    """
    from torch.distributed.tensor import DTensor

    y: Any = base(x)
    product = F.linear(F.linear(_part(x), _part(linear.lora_a)) * scale, _part(linear.lora_b))
    return y + DTensor.from_local(product, y.device_mesh, y.placements, run_check=False)


def _part(values: Any) -> Tensor:
    """What this rank has. Of what all have each rank only works out a part of the gradient: they are to be added up."""
    from torch.distributed.tensor import Partial

    partly = [Partial()] if values.placements[0].is_replicate() else None
    local: Tensor = values.to_local(grad_placements=partly)
    return local
