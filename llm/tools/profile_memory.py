"""What a step of a configuration really keeps in memory, beside what :mod:`llm.estimate.memory` says.

``python -m llm.tools.profile_memory --config config.yaml`` runs two steps of one rank. On the CPU they are run on fake
tensors, which have shapes and no values: any model can be looked at, at no cost. With ``--device cuda`` they are real,
and the peak is the allocator's.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm.estimate.memory import memory
from llm.utils.config import ConfigError, TrainingConfig, load


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
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(compare(load(arguments.config), arguments.device), indent=1))
    except ConfigError as error:
        print(f"profile_memory: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
