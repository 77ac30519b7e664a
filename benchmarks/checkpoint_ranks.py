"""Ranks for the benchmark: processes that hold a sharded model and its optimizer's state, and do what they are told."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_store import SPAWN, free_ports
from torch import Tensor

from llm.model.transformer import Transformer
from llm.train.dist import lay_out, shard
from llm.train.optim.adamw import AdamW
from llm.train.world import World
from llm.utils.config import DistConfig, ModelConfig, TrainConfig
from llm.utils.sharding import local, place

ANSWER_S = 600.0
LAYERS, FEW_LAYERS = 9, 3  # 353 MB in 252 tensors, and 126 MB in 90


@dataclass
class Rank:
    """What the functions of checkpoint_ours and checkpoint_peers work on, one thread to a rank."""

    world: World
    aside: Any  # a process group for collectives in the background
    state: dict[str, Tensor]
    kept: dict[str, Any] = field(default_factory=dict)  # by whoever needs it next time

    @property
    def mine(self) -> list[Tensor]:
        """This rank's rows of everything."""
        return [local(each) for each in self.state.values()]

    @property
    def bytes(self) -> int:
        """Of this rank's rows."""
        return sum(each.nbytes for each in self.mine)

    @contextlib.contextmanager
    def clock(self) -> Iterator[list[float]]:
        """Seconds of what is inside, which all ranks begin together."""
        dist.barrier()
        taken: list[float] = []
        began = time.perf_counter()
        yield taken
        taken.append(time.perf_counter() - began)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Zero the state; what is inside must bring it back, bit by bit."""
        before = [each.clone() for each in self.mine]
        for each in self.mine:
            each.zero_()
        yield
        for each, value in zip(self.mine, before, strict=True):
            assert torch.equal(each, value), "what was loaded is not what was saved"

    def bytes_of_state(self) -> Tensor:
        """As many bytes in a row as this rank's state has, in memory that has been used before."""
        if "flat" not in self.kept:
            self.kept["flat"] = torch.cat([each.view(torch.uint8).flatten() for each in self.mine])
        return self.kept["flat"]


class Team:
    """``size`` ranks over gloo. ``big`` > 0: a single plain tensor of so many bytes in place of the model."""

    def __init__(
        self, size: int, layers: int = LAYERS, big: int = 0, environment: dict[str, str] | None = None
    ) -> None:
        self.size = size
        port = free_ports(1)[0]
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = SPAWN.Pipe()
            arguments = (rank, size, port, layers, big, environment or {}, theirs)
            self.processes.append(SPAWN.Process(target=_serve, args=arguments))
            self.processes[-1].start()
            theirs.close()
            self._pipes.append(ours)
        self._answers("start")
        self.bytes = sum(self.call(_bytes))

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(60)
            if process.is_alive():
                process.kill()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """Have every rank call ``function(rank, ...)``, all at the same time; what each returns."""
        for pipe in self._pipes:
            pipe.send((function, arguments, options))
        return self._answers(function.__name__)

    def slowest(self, function: Callable[..., float], *arguments: Any, **options: Any) -> float:
        """The same for seconds: those of the slowest."""
        return max(self.call(function, *arguments, **options))

    def _answers(self, what: str) -> list[Any]:
        answers, until = [], time.monotonic() + ANSWER_S
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(until - time.monotonic(), 0)):
                raise TimeoutError(f"rank {rank} did not answer {what} within {ANSWER_S:.0f} s")
            failure, answer = pipe.recv()
            if failure is not None:
                raise RuntimeError(f"rank {rank}, {what}:\n{failure}")
            answers.append(answer)
        return answers


def _serve(rank: int, size: int, port: int, layers: int, big: int, environment: dict[str, str], pipe: Any) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        world = World(rank, size, rank, torch.device("cpu"), grouped=size > 1)
        state = {"model.big": torch.empty(big // 4).uniform_()} if big else _state(world, layers)
        worker = Rank(world, dist.new_group(backend="gloo"), state)
        pipe.send((None, None))
        while (task := pipe.recv()) is not None:
            function, arguments, options = task
            pipe.send((None, function(worker, *arguments, **options)))
        for each in worker.kept.values():
            if hasattr(each, "close"):
                each.close()
        dist.destroy_process_group()
    except BaseException:  # DCP's own errors are no Exceptions
        pipe.send((traceback.format_exc(), None))
        os._exit(1)  # others may wait for this rank in a collective


@torch.no_grad()
def _state(world: World, layers: int) -> dict[str, Tensor]:
    """Our model and our optimizer's state: values that depend on the tensor alone, whoever holds it."""
    shape = ModelConfig(
        name="bench", vocab_size=1024, dim=512, n_layers=layers, n_heads=8, n_kv_heads=8, ffn_dim=1376, max_seq_len=8
    )
    train = TrainConfig(max_steps=1, seq_len=8, global_batch_size=8, micro_batch_size=1, lr=1e-3)
    with torch.device("meta" if world.grouped else "cpu"):
        model = Transformer(shape)
    if world.grouped:
        mesh = lay_out(DistConfig(), world).mesh
        assert mesh is not None
        shard(model, model.blocks.values(), mesh, torch.float32)
        model.to_empty(device="cpu")
        model.tie()
    state = AdamW(dict(model.named_parameters()), train).state()
    for seed, tensor in enumerate(state.values()):
        whole = torch.empty(tensor.shape).uniform_(generator=torch.Generator().manual_seed(seed))
        local(tensor).copy_(whole[slice(*place(tensor))])
    return state


def _bytes(rank: Rank) -> int:
    return rank.bytes


def enter(rank: Rank, group: str) -> None:
    """Join a control group, with what is started from now on."""
    with open(group, "w") as stream:  # noqa: PTH123
        stream.write(str(os.getpid()))
