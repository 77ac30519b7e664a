"""How a model is spread over ranks: one device mesh, and one order in which parallelism is applied to a plain model.

Ranks are numbered with pipeline stages outermost, then copies, shards, parts of a sequence, and tensor parallelism
innermost, so that those who exchange most share a node. The order of application, in :func:`parallelize`:

    float8 -> tensor parallel -> adapters -> (the model is a pipeline's stage already) -> activation checkpointing
    -> compile -> FSDP / HSDP
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from llm.model.transformer import Transformer
from llm.train.float8 import convert
from llm.train.lora import add_adapters
from llm.train.world import World
from llm.utils.config import DistConfig, TrainingConfig, data_parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """This rank's place on every axis. ``dp_*`` count copies and shards together: ranks with rows of their own."""

    world: World
    replicate: int
    shard: int
    dp: int
    dp_rank: int
    cp: int
    cp_rank: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    mesh: DeviceMesh | None  # axes pp, dp_replicate, dp_shard (x cp) and tp, as far as they have more than one rank

    @property
    def gathered(self) -> int:
        """Over how many ranks FSDP averages gradients."""
        return self.dp * self.cp

    @property
    def speaks(self) -> bool:
        """Do this rank's losses count? Those of a sequence's tensor-parallel ranks are equal; one stage has them."""
        return self.tp_rank == 0 and self.pp_rank == self.pp - 1

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on ``axis`` alone."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    def sizes(self) -> dict[str, int]:
        """Number of ranks on every axis, for records."""
        return dict(zip(AXES, (self.pp, self.replicate, self.shard, self.cp, self.tp), strict=True))


def lay_out(config: DistConfig, world: World) -> Layout:
    """Place this rank and, where there are others, join the groups of its axes. Raises ConfigError."""
    dp = data_parallel(config, world.size)
    shard = dp // config.dp_replicate
    tp_rank, rest = world.rank % config.tp, world.rank // config.tp
    cp_rank, rest = rest % config.cp, rest // config.cp
    dp_rank, pp_rank = rest % dp, rest // dp
    mesh = None
    if world.grouped:
        from torch.distributed.device_mesh import init_device_mesh

        # Ranks that share a sequence hold the same weights, as those of FSDP do: they are one axis.
        sizes = {"pp": config.pp, "dp_replicate": config.dp_replicate, "dp_shard": shard * config.cp, "tp": config.tp}
        axes = tuple(axis for axis, size in sizes.items() if size > 1 or axis == "dp_shard")
        mesh = init_device_mesh(world.device.type, tuple(sizes[axis] for axis in axes), mesh_dim_names=axes)
    return Layout(
        world=world,
        replicate=config.dp_replicate,
        shard=shard,
        dp=dp,
        dp_rank=dp_rank,
        cp=config.cp,
        cp_rank=cp_rank,
        tp=config.tp,
        tp_rank=tp_rank,
        pp=config.pp,
        pp_rank=pp_rank,
        mesh=mesh,
    )


def parallelize(model: Transformer, layout: Layout, config: TrainingConfig) -> None:
    """Spread ``model``, the whole of it or one stage of a pipeline, on the meta device, over the ranks of its stage.

    Where there is one rank alone, only what makes its steps cheaper is applied.
    """
    train = config.train
    convert(model, train, layout.world.device)
    if layout.tp > 1:
        from llm.train.tensor_parallel import split_matrices

        assert layout.mesh is not None
        split_matrices(model, layout.mesh["tp"])
    if layout.cp > 1:
        from llm.train.context_parallel import share_sequences

        share_sequences(model, layout)
    add_adapters(model, config.lora)
    for block in model.blocks.values():
        if train.activation_checkpointing != "none":
            checkpoint_activations(block, selective=train.activation_checkpointing == "selective")
        if train.compile:
            # The forward alone: what FSDP hooks to the module stays outside.
            block.forward = torch.compile(block.forward, fullgraph=True)
    if layout.mesh is not None:
        reshard = config.dist.reshard_after_forward
        axes = ("dp_replicate", "dp_shard") if layout.replicate > 1 else ("dp_shard",)
        shard(model, model.blocks.values(), layout.mesh[axes], getattr(torch, train.dtype), reshard)


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    reshard_after_forward: bool = True,
) -> None:
    """FSDP2: each block is a unit of its own, gathered for its own forward and backward; the root holds the rest.

    Weights and reductions stay float32; blocks compute in ``dtype``. The first shard costs most of a second: DTensor
    works out shapes with fake tensors, and those import torch's compiler. One rank alone never pays for it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary table stays float32; what else enters a block has its dtype already
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def checkpoint_activations(block: nn.Module, selective: bool) -> None:
    """Keep of ``block`` its inputs alone, and work out the rest again in the backward pass (Chen et al., 2016).

    ``selective`` also keeps what matrix products and attention gave, the costly part, and recomputes what lies between.
    """
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _costly())
    # There is no randomness inside: no generator's state is kept.
    block.forward = partial(checkpoint, block.forward, preserve_rng_state=False, **options)


def _costly() -> list[Any]:
    ops = torch.ops.aten
    return [
        ops.mm.default,
        ops.addmm.default,
        ops._scaled_mm.default,
        ops._scaled_dot_product_flash_attention.default,
        ops._scaled_dot_product_flash_attention_for_cpu.default,
        ops._scaled_dot_product_efficient_attention.default,
        ops._scaled_dot_product_cudnn_attention.default,
        ops._scaled_dot_product_attention_math.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
    ]
