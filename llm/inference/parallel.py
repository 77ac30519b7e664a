"""Tensor parallelism for generation: heads, inner values and vocabulary over the ranks, plain tensors, two reductions
a layer (Shoeybi et al., "Megatron-LM", 2019).

Training spreads positions over the ranks as well (``llm.train.tensor_parallel``), which one position at a time is not.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.model.transformer import Transformer
from llm.train.pieces import LocalPiece
from llm.train.world import World
from llm.utils.config import ConfigError, ModelConfig

ROWS = ("wq", "wk", "wv", "gate", "up")  # matrices of a block whose rows are spread, so that each rank has whole heads
COLUMNS = ("wo", "down")  # and those whose columns are: what they give is added up


def check_split(config: ModelConfig, parts: int) -> None:
    """Raises ConfigError for a model that ``parts`` ranks cannot share."""
    keys = ("n_heads", "n_kv_heads", "ffn_dim", *(() if config.tie_embeddings else ("vocab_size",)))
    for key in keys:
        if (value := getattr(config, key)) % parts:
            raise ConfigError(f"{parts} ranks cannot share model.{key}={value}: choose a number that divides it")


def split_model(model: Transformer, world: World) -> list[LocalPiece]:
    """Leave of ``model``, which must be on the meta device, this rank's part, on its device and unfilled.

    Returns where the part lies in the whole. Raises ConfigError, as :func:`check_split`.
    """
    check_split(model.config, world.size)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    dims: dict[str, int] = {}
    for number, block in model.blocks.items():
        for part in ("attention", "ffn"):
            for name, linear in getattr(block, part).named_children():
                where = f"blocks.{number}.{part}.{name}"
                if name in ROWS:
                    dims |= _shrink(linear, where, 0, world)
                elif name in COLUMNS:
                    dims |= _shrink(linear, where, 1, world)
                    linear.register_forward_hook(_add_up)
    if not model.config.tie_embeddings:  # a tied head is the embedding, which every rank needs whole
        dims |= _shrink(model.head, "head", 0, world)
        model.head.register_forward_hook(_gather)
    model.to_empty(device=world.device)
    model.tie()
    pieces = []
    for name, parameter in model.named_parameters():
        offset = [0] * parameter.dim()
        if name in dims:
            offset[dims[name]] = world.rank * parameter.shape[dims[name]]
        pieces.append(LocalPiece(f"model.{name}", parameter.detach(), shapes[name], offset, spread=world.size))
    return pieces


def only_once(model: Transformer, world: World) -> None:
    """Biases of matrices whose results are added up count on the first rank alone. To be called when they are there."""
    for name, parameter in model.named_parameters():
        if world.rank and name.endswith(tuple(f"{matrix}.bias" for matrix in COLUMNS)):
            parameter.detach().zero_()


def _shrink(linear: nn.Module, name: str, dim: int, world: World) -> dict[str, int]:
    """Keep of a matrix (out, in) a part along ``dim``, and of its bias if rows are spread: which were split, how."""
    split = {}
    for kind, parameter in list(linear.named_parameters(recurse=False)):
        if kind == "bias" and dim == 1:
            continue
        shape = list(parameter.shape)
        shape[dim] //= world.size
        setattr(linear, kind, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta")))
        split[f"{name}.{kind}"] = dim
    return split


def _add_up(_: nn.Module, __: object, output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output


def _gather(_: nn.Module, __: object, logits: Tensor) -> Tensor:
    """All of the vocabulary: logits (…, V / ranks) to (…, V)."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts, dim=-1)
