"""Processes that play the ranks of many small jobs, joined over gloo."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm.train.world import World

RANKS = 8
DEADLINE_S = 120.0


class Ranks:
    """Processes that stay, so that torch is imported once: each call joins some of them to a group of its own."""

    def __init__(self, folder: Path, size: int = RANKS) -> None:
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor"])
        self.ends: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(rank, theirs), daemon=True))
            self.processes[-1].start()
            self.ends.append(mine)

    def __call__(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``work(world, *arguments)`` returns on each of ``size`` ranks; an error there is one here."""
        store = str(self.folder / secrets.token_hex(8))
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        for end in self.ends[:size]:
            end.send((size, store, environment, work, arguments))
        deadline = time.monotonic() + DEADLINE_S
        answers = []
        for rank, end in enumerate(self.ends[:size]):
            assert end.poll(max(deadline - time.monotonic(), 0)), f"rank {rank} of {size} did not answer"
            answers.append(end.recv())
        errors = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text is not None]
        assert not errors, "\n".join(errors)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, calls: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        size, store, environment, work, arguments = calls.recv()
        os.environ.update(environment)
        try:
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            calls.send((None, work(World(rank, size, rank, torch.device("cpu"), size > 1), *arguments)))
        except BaseException:
            calls.send((traceback.format_exc(), None))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
