"""Processes, devices, and how the model is spread over them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.utils.config import DistConfig


@dataclass(frozen=True)
class World:
    """This rank's place among all of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    grouped: bool  # is there a process group?

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over all ranks, in place."""
        if self.grouped:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Is ``flag`` set on any rank? Waits for all of them."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def failure(self, reason: str | None) -> str | None:
        """Why any rank failed, the same text on every rank, or None when all have given None. Waits for all of them."""
        if not self.grouped:
            return reason
        failed = torch.tensor(0 if reason is None else self.rank + 1, device=self.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if (culprit := int(failed) - 1) < 0:
            return None
        text = f"rank {self.rank}: {reason}".encode()[:1024].ljust(1024)
        message = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
        dist.broadcast(message, src=culprit)
        return bytes(message.tolist()).decode(errors="replace").rstrip()

    def from_first(self, values: list[int]) -> list[int]:
        """Rank 0's ``values`` (equally many everywhere)."""
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.grouped:
            dist.broadcast(tensor, src=0)
        return [int(value) for value in tensor.tolist()]


def connect(config: DistConfig, rank: int, size: int, local_rank: int) -> World:
    """Choose the device and join the other ranks. One rank alone needs no process group, whatever the mode."""
    cuda = config.backend == "nccl" or (config.backend == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, local_rank, device, grouped=False)
    options: dict[str, Any] = {"backend": "nccl" if cuda else "gloo", "timeout": timedelta(seconds=config.timeout_s)}
    if cuda:
        options["device_id"] = device
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size) or os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        # All ranks are on this machine: its own name may resolve to an address that is not reachable.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(**options)
    return World(rank, size, local_rank, device, grouped=True)


def shard(model: nn.Module, blocks: nn.ModuleList, world: World, dtype: torch.dtype) -> None:
    """FSDP2: each block is a unit of its own, gathered for its own forward and backward; the root holds the rest.

    Weights and reductions stay float32; blocks compute in ``dtype``. The first shard costs most of a second: DTensor
    works out shapes with fake tensors, and those import torch's compiler. One rank alone never pays for it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary table stays float32; what else enters a block has its dtype already
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
