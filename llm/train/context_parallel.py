"""Context parallelism: the positions of every sequence are spread over ranks; keys and values are gathered.

A rank has two runs of positions, one from the front and one as far from the back, so that under a causal mask all
have the same work (Llama 3, section 3.3.2, 2024; all-gather instead of a ring, for the same reason: any mask works).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llm.model.layers import Block
from llm.model.transformer import Transformer
from llm.train.dist import Layout


def own_positions(length: int, ranks: int, rank: int) -> Tensor:
    """Which of ``length`` positions ``rank`` has: int64 (length / ranks)."""
    run = length // (2 * ranks)
    front, back = rank * run, (2 * ranks - 1 - rank) * run
    return torch.cat((torch.arange(front, front + run), torch.arange(back, back + run)))


def share_sequences(model: Transformer, layout: Layout) -> None:
    """Let the attention of ``model`` see the keys and values of all ranks that share a sequence."""
    group = _group(layout)
    model.parts = layout.cp

    def gather(x: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(x, group, layout.cp)  # type: ignore[no-untyped-call]
        return gathered

    for block in model.blocks.values():
        cast("Block", block).attention.gather = gather


def _group(layout: Layout) -> dist.ProcessGroup:
    """The ranks that share this rank's sequences. All ranks make all such groups, in the same order."""
    ranks = torch.arange(layout.world.size).view(-1, layout.cp, layout.tp).transpose(1, 2).reshape(-1, layout.cp)
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())  # type: ignore[no-untyped-call]
    return group  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """All positions of (B, K, T / ranks, E), in their order; the gradients of what others saw are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
        ctx.group, ctx.ranks = group, ranks
        first, second = x.chunk(2, dim=2)
        mine = torch.stack((first, second)).contiguous()  # (2, B, K, T / 2 ranks, E)
        everyone = mine.new_empty(ranks * 2, *mine.shape[1:])
        dist.all_gather_into_tensor(everyone, mine, group=group)
        runs = [*everyone[0::2], *everyone[1::2].flip(0)]
        return torch.cat(runs, dim=2)  # (B, K, T, E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        runs = torch.stack(grads[0].chunk(2 * ctx.ranks, dim=2))  # (2 ranks, B, K, T / 2 ranks, E)
        everyone = torch.stack((runs[: ctx.ranks], runs[ctx.ranks :].flip(0)), dim=1).flatten(0, 1)
        mine = torch.empty_like(everyone[:2])
        dist.reduce_scatter_tensor(mine, everyone, group=ctx.group)
        return torch.cat((mine[0], mine[1]), dim=2), None, None
