"""The ranks of a run, and what they tell each other outside of the training itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint.format import CheckpointError, DamagedError
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

    def raise_together(self, failure: Exception | None, complaint: str = "") -> None:
        """Raise the same on every rank when any of them has failed, and nothing when all have given None.

        Damage that one rank has proven outranks what others could not do: DamagedError, else CheckpointError.
        """
        prefix = f"{complaint}: " if complaint else ""
        damaged = isinstance(failure, DamagedError)
        if not self.grouped:
            if failure is not None:
                raise (DamagedError if damaged else CheckpointError)(prefix + str(failure)) from failure
            return
        kind = torch.tensor(0 if failure is None else 2 if damaged else 1, device=self.device)
        dist.all_reduce(kind, op=dist.ReduceOp.MAX)
        if not (worst := int(kind)):
            return
        speaks = failure is not None and (damaged or worst == 1)
        reason = self.failure(str(failure) if speaks else None)
        raise (DamagedError if worst == 2 else CheckpointError)(f"{prefix}{reason}") from failure

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """``data`` of every rank; any length."""
        if not self.grouped:
            return [data]
        mine = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        lengths = [torch.zeros_like(mine) for _ in range(self.size)]
        dist.all_gather(lengths, mine)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(max(sizes), 1), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        padded = padded.to(self.device)
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded)
        return [each[:size].cpu().numpy().tobytes() for each, size in zip(everyone, sizes, strict=True)]

    def bytes_from_first(self, data: bytes) -> bytes:
        """Rank 0's ``data``; what the others give is ignored."""
        if not self.grouped:
            return data
        if not (size := self.from_first([len(data)])[0]):
            return b""
        tensor = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensor = tensor.to(self.device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu().numpy().tobytes()

    def exchange(self, data: Tensor, sizes: list[int], expected: list[int]) -> Tensor:
        """Send ``sizes[r]`` bytes of ``data`` (uint8, on the CPU) to each rank r; returns what the others sent.

        ``expected`` has how many bytes each rank sends. All ranks call it together.
        """
        result = torch.empty(sum(expected), dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(result, data.to(self.device), expected, sizes)
        return result.cpu()

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
