"""What a rank does for the benchmark with our own engine. Seconds count from a barrier."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from checkpoint_ranks import Rank

from llm.checkpoint.format import Commit
from llm.checkpoint.retention import Retention
from llm.train.checkpoint import Checkpointer
from llm.utils.storage import open_storage

LIMIT_S = 300.0
GRADIENT = 1 << 20  # values that a step reduces
MATRIX, PRODUCTS = 512, 12  # what a step computes


def reach(rank: Rank, environment: dict[str, str]) -> None:
    """Use the store in another way from now on: by another link, or another server."""
    os.environ.update(environment)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    rank.kept.pop("client", None)
    shut(rank)


def open_run(rank: Rank, url: str) -> None:
    """A run directory for what follows. Its staging buffer is warm, as it is when a run comes to its first save."""
    shut(rank)
    checkpointer = Checkpointer(open_storage(url), rank.world, 0, 0, Retention(), LIMIT_S)
    checkpointer.attach(rank.state)
    checkpointer.saver.staging._settle()
    rank.kept["ours"] = checkpointer


def shut(rank: Rank) -> None:
    """Close the run directory."""
    if (checkpointer := rank.kept.pop("ours", None)) is not None:
        checkpointer.close()


def staging(rank: Rank) -> int:
    """Bytes of the staging buffer."""
    return rank.kept["ours"].saver.layout.size


def save(rank: Rank, step: int) -> tuple[float, Commit]:
    """From the request to the commit."""
    with rank.clock() as taken:
        commit = rank.kept["ours"].save(step, {"step": step})
        rank.kept["ours"].wait()
    return taken[0], commit


def blocked(rank: Rank, step: int) -> float:
    """What a save costs the training; it ends before this returns."""
    save(rank, step)
    return rank.kept["ours"].blocked_s


def load(rank: Rank, commit: Commit) -> float:
    """Load, every checksum verified, and then see that it is right."""
    with rank.restored(), rank.clock() as taken:
        rank.kept["ours"].load(commit)
    return taken[0]


def begin(rank: Rank, step: int) -> Callable[[], bool]:
    """Begin a save; the function tells whether it is over. To be called once a step, as training does."""
    checkpointer = rank.kept["ours"]
    checkpointer.save(step, {"step": step})

    def over() -> bool:
        checkpointer.poll()
        return not checkpointer.saver.busy

    return over


def steps(rank: Rank, start: Callable[..., Callable[[], bool]], *arguments: Any, rest: int = 40) -> list[float]:
    """Seconds of a step without a save, of one while it drains, and of that save.

    A step is a row of matrix products and a sum of ``GRADIENT`` values over all ranks.
    """
    matrix, gradient = torch.eye(MATRIX), torch.zeros(GRADIENT)

    def step(over: bool) -> bool:
        for _ in range(PRODUCTS):
            matrix.copy_(matrix @ matrix)
        gradient[0] = float(over)
        dist.all_reduce(gradient)
        return bool(gradient[0] == dist.get_world_size())

    def alone() -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(rest):
            step(False)
        return (time.perf_counter() - began) / rest

    before = alone()
    dist.barrier()
    requested = time.perf_counter()
    over = start(rank, *arguments)
    began, count = time.perf_counter(), 1
    while not step(over()):
        count += 1
    ended = time.perf_counter()
    return [(before + alone()) / 2, (ended - began) / count, ended - requested]
