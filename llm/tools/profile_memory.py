"""What a step of a configuration really keeps in memory, beside what :mod:`llm.estimate.memory` says.

``python -m llm.tools.profile_memory --config config.yaml`` runs two steps of one rank. On the CPU they are run on fake
tensors, which have shapes and no values: any model can be looked at, at no cost. With ``--device cuda`` they are real,
and the peak is the allocator's. ``--ranks N --rank R`` builds rank R of N instead, spread as the configuration says, on
made-up ranks that exchange nothing: what it holds between two steps, beside the estimate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm.estimate.memory import memory
from llm.utils.config import ConfigError, TrainingConfig, load

if TYPE_CHECKING:
    from llm.train.dist import Layout


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that were made inside and still live: ``now``, and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def measure(config: TrainingConfig, device: str = "cpu") -> dict[str, int]:
    """Bytes of one rank: ``state`` between steps with its gradients, ``activations`` that the forward pass of a
    micro-batch leaves, ``peak`` of the second micro-batch of a step. The layout of ``config`` is not looked at."""
    if device == "cuda":
        return _measured(config, device)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _measured(config, device)


def _measured(config: TrainingConfig, device: str) -> dict[str, int]:
    import gc

    from llm.model.transformer import Transformer
    from llm.train.dist import checkpoint_activations
    from llm.train.optim import build

    train = config.train
    live = Live()
    shape = (train.micro_batch_size, train.seq_len)
    with live:
        with torch.device(device):
            model = Transformer(config.model)
            tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        if train.activation_checkpointing != "none":
            for block in model.blocks.values():
                checkpoint_activations(block, selective=train.activation_checkpointing == "selective")
        model.head.chunk, model.head.z_loss = train.loss_chunk, train.z_loss
        optimizer = build(dict(model.named_parameters()), train, config.model)
        _pass(model, tokens, targets, train.dtype).backward()  # type: ignore[no-untyped-call]
        gc.collect()
        state = live.now - 2 * tokens.nbytes
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        live.peak = live.now
        loss = _pass(model, tokens, targets, train.dtype)
        kept = live.now - state
        loss.backward()  # type: ignore[no-untyped-call]
        del optimizer
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else live.peak
    return {"state": state, "activations": kept, "peak": peak}


def measure_state(config: TrainingConfig, ranks: int, rank: int = 0) -> dict[str, int]:
    """Bytes that rank ``rank`` of ``ranks`` holds between two steps: ``weights``, their ``gradients``, ``optimizer``.

    The model is spread by the trainer's own code, without memory, among ranks that do not exist. Not inside a process
    that has ranks already.
    """
    from llm.train.lora import trained
    from llm.train.optim import build
    from llm.utils.sharding import local

    with made_up_ranks(config, ranks, rank) as layout:
        parameters = sharded(config, layout)
        state = build(parameters, config.train, config.model).state()
        with torch.no_grad():
            of_model = {name: local(p).nbytes for name, p in parameters.items()}
            optimizer = sum(local(s).nbytes for name, s in state.items() if not name.startswith("model."))
        gradients = sum(of_model[name] for name in trained(parameters))
    return {"weights": sum(of_model.values()), "gradients": gradients, "optimizer": optimizer}


@contextlib.contextmanager
def made_up_ranks(config: TrainingConfig, ranks: int, rank: int) -> Iterator[Layout]:
    """The layout of one rank of ``ranks``, whose collectives return at once and do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from llm.train.dist import lay_out
    from llm.train.world import World

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield lay_out(config.dist, World(rank, ranks, 0, torch.device("cpu"), grouped=True))
    finally:
        dist.destroy_process_group()


def sharded(config: TrainingConfig, layout: Layout) -> dict[str, nn.Parameter]:
    """The parameters of this rank's stages, spread and on the meta device, by canonical name."""
    from llm.model.transformer import Transformer
    from llm.train.dist import parallelize
    from llm.train.pipeline import stage_layers

    found: dict[str, nn.Parameter] = {}
    for layers in stage_layers(config.model, config.train.seq_len, config.dist, layout.pp_rank):
        with torch.device("meta"):
            model = Transformer(config.model, layers)
        parallelize(model, layout, config)
        found.update(model.named_parameters())
    return found


def compare_state(config: TrainingConfig, ranks: int, rank: int = 0) -> dict[str, dict[str, float]]:
    """``measured`` and ``estimated`` bytes of :func:`measure_state`."""
    from llm.estimate.memory import memory_of
    from llm.utils.config import check, data_parallel

    check(config, ranks)
    if not 0 <= rank < ranks:
        raise ConfigError(f"--rank {rank}: there are ranks 0 to {ranks - 1}")
    along = rank // (data_parallel(config.dist, ranks) * config.dist.cp * config.dist.tp)
    found = memory_of(config.model, config.train, config.dist, ranks, config.lora, along)
    measured = {name: float(value) for name, value in measure_state(config, ranks, rank).items()}
    return {"measured": measured, "estimated": {name: found.kinds()[name] for name in measured}}


def _pass(model: nn.Module, tokens: Tensor, targets: Tensor, dtype: str) -> Tensor:
    with torch.autocast(tokens.device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        losses: Tensor = model(tokens, targets)
    return losses[0]


def compare(config: TrainingConfig, device: str = "cpu") -> dict[str, dict[str, float]]:
    """``measured`` and ``estimated`` bytes of ``state``, ``activations`` and ``peak``, of one rank alone."""
    import msgspec

    from llm.estimate.memory import kept_by_loss
    from llm.utils.config import DistConfig

    alone = DistConfig(dp_shard=1)
    train = msgspec.structs.replace(config.train, ema_decay=0.0)
    found = memory(config.model, train, alone, 1)
    estimated = {
        "state": found.state,
        "activations": found.activations + kept_by_loss(config.model, train, alone) + found.gathered,
        "peak": found.total,
    }
    measured = {name: float(value) for name, value in measure(config, device).items()}
    return {"measured": measured, "estimated": estimated}


def main(argv: Sequence[str] | None = None) -> int:
    """Print both as JSON. Exit code 2 for a configuration that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m llm.tools.profile_memory", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the config.yaml of a run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="fake tensors, or a real GPU")
    parser.add_argument("--ranks", type=int, metavar="N", help="what one rank of N holds between two steps")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of which rank (default: 0)")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config)
        if arguments.ranks is None:
            found = compare(config, arguments.device)
        else:
            found = compare_state(config, arguments.ranks, arguments.rank)
        print(json.dumps(found, indent=1))
    except ConfigError as error:
        print(f"profile_memory: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
