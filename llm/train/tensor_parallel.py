"""Tensor parallelism: every matrix of a block is split over ranks, and activations between them by position.

The scheme is Megatron-LM's (Shoeybi et al., 2019) with sequence parallelism (Korthikanti et al., 2022): the first
matrices of a part are split by rows, so each rank has whole heads or inner values; the last one by columns, and its
partial sums are added up and spread by position in one reduce-scatter. The vocabulary is split as well, and the loss
is worked out without any rank seeing a whole row of logits.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from llm.model.layers import Block
from llm.model.loss import linear_cross_entropy
from llm.model.transformer import Head, Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

POSITIONS = 1  # the dimension of (B, T, D) that is split between parts
HEADS = 2  # and that of (B, T, H, E)


def split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Split ``model``, on the meta device, over the ranks of the one-dimensional ``mesh``."""
    by_position = Shard(POSITIONS)
    plan = {
        "attention_norm": SequenceParallel(sequence_dim=POSITIONS),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.q_norm": SequenceParallel(sequence_dim=HEADS, use_local_output=True),
        "attention.k_norm": SequenceParallel(sequence_dim=HEADS, use_local_output=True),
        "attention.wo": RowwiseParallel(output_layouts=by_position),
        "ffn_norm": SequenceParallel(sequence_dim=POSITIONS),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=by_position),
    }
    for block in model.blocks.values():
        there = {name for name, _ in block.named_modules()}  # not every model has norms of queries and keys
        parallelize_module(block, mesh, {name: style for name, style in plan.items() if name in there})
        for part in (cast("Block", block).attention, cast("Block", block).ffn):
            part.register_forward_pre_hook(_all_positions)
    if hasattr(model, "embedding"):
        rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=by_position)
        parallelize_module(model, mesh, {"embedding": rows})
        # What comes out is still on its way, a tensor of a class of its own, and a compiled block that takes it gives
        # no gradient back (seen with torch 2.13). A copy has arrived.
        model.embedding.register_forward_hook(lambda _, __, output: output.clone())
    if model.last:
        parallelize_module(model, mesh, {"norm": SequenceParallel(sequence_dim=POSITIONS, use_local_output=True)})
        head = model.head
        if not model.config.tie_embeddings:
            head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))
        head.forward = partial(_split_head, head, mesh)  # type: ignore[method-assign]
    model.tie()


def _all_positions(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gather the positions of the first input, a DTensor from the norm. It stays one: the gradients of the matrices
    that use it are then added up once, in one reduce-scatter."""
    x, *others = inputs
    return (x.redistribute(placements=[Replicate()]), *others)


def _split_head(head: Head, mesh: DeviceMesh, x: Tensor, targets: Tensor | None = None) -> Tensor:
    """The head on this rank's part of the vocabulary; ``x`` (B, T / ranks, D) has this rank's positions."""
    spread = DTensor.from_local(x, mesh, [Shard(POSITIONS)], run_check=False).redistribute(mesh, [Replicate()])
    # Each rank's gradient is that of its part of the vocabulary: they have to be added up.
    x = spread.to_local(grad_placements=[Partial()])  # (B, T, D)
    weight: Any = head.weight
    weight = weight.to_local() if isinstance(weight, DTensor) else weight  # (V / ranks, D)
    if targets is not None:
        return linear_cross_entropy(x, weight, targets, head.chunk, head.z_loss, mesh.get_group())
    whole = DTensor.from_local(F.linear(x, weight), mesh, [Shard(2)], run_check=False).redistribute(mesh, [Replicate()])
    logits: Tensor = whole.to_local()  # (B, T, V)
    return logits
