"""Exports of a checkpoint of adapters: merged into the weights that they were trained beside, or alone for PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm.checkpoint.format import CheckpointError
from llm.model.transformer import Transformer
from llm.tools.destination import new_folder
from llm.tools.export import PIECE, Exported, Part, Saved
from llm.tools.hf_names import to_hf
from llm.train.base import Base, as_state, check_base, checksum, open_base
from llm.train.lora import A, B, is_adapter
from llm.train.pieces import DTYPES
from llm.utils.config import TrainingConfig


@dataclass(frozen=True)
class Merged(Exported):
    """The whole model, W + alpha / rank x B A in the place of each adapted W, in float32.

    Reading all of it also sums the base up: :meth:`read` raises ConfigError at the end if it is not the one that the
    adapters were trained beside. Memory: all adapters, and a piece of a tensor.
    """

    config: TrainingConfig
    base: Base
    adapters: dict[str, Tensor]
    sums: dict[str, int] = field(default_factory=dict)  # checksum of every tensor that was read

    def read(self, names: Sequence[str]) -> Iterator[tuple[Part, Tensor]]:
        """The values of these tensors, in this order, in parts of some rows."""
        for name in names:
            shape = self.tensors[name].shape
            own = name.removeprefix("model.")
            a, b = (self.adapters.get(f"{name.removesuffix('.weight')}.{half}") for half in (A, B))
            step = max(PIECE // (4 * max(self.tensors[name].bytes // (4 * shape[0]), 1)), 1)
            for begin in range(0, shape[0], step):
                rows = slice(begin, min(begin + step, shape[0]))
                values = self.base.rows(own, tuple(shape), rows).float()
                box = (rows, *(slice(0, size) for size in shape[1:]))
                self.sums[name] = self.sums.get(name, 0) + checksum(own, values, tuple(shape), box)
                if a is not None and b is not None:
                    values = values + self.config.lora.scale * (b[rows].float() @ a.float())
                self.advance(values.nbytes)
                yield Part(name, [begin, *(0 for _ in shape[1:])], list(values.shape)), values
        if len(self.sums) == len(self.tensors):
            check_base(as_state(self.config, sum(self.sums.values())), self.manifest.state.get("base"))


def has_adapters(source: Exported) -> bool:
    """Is it a checkpoint of adapters, without the model?"""
    return any(is_adapter(name) for name in source.tensors)


def merged(source: Exported, config: TrainingConfig) -> Merged:
    """``source``, of a run with ``config``, as a checkpoint of the whole model. Raises ConfigError for its base."""
    with torch.device("meta"):
        shapes = {f"model.{name}": list(p.shape) for name, p in Transformer(config.model).named_parameters()}
    tensors = {name: Saved("F32", shape) for name, shape in shapes.items()}
    adapters = source.whole(_adapters(source))
    return Merged(
        source.storage, source.commit, source.manifest, tensors, source.advance, config, open_base(config), adapters
    )


def export_peft(source: Exported, config: TrainingConfig, dtype: str | None, target: str) -> None:
    """The adapters alone, as PEFT reads them: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises CheckpointError where there are none.
    """
    from safetensors.torch import save

    if not has_adapters(source):
        raise CheckpointError(f"{source.commit.path} has no adapters: the run was none with lora.rank; use --format hf")
    tensors = source.whole(_adapters(source))
    if dtype is not None:
        tensors = {name: values.to(DTYPES[dtype]) for name, values in tensors.items()}
    lora = config.lora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.train.init_from,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_peft(name).split(".")[-3] for name in tensors}),
        "inference_mode": True,
    }
    with new_folder(target) as folder:
        with folder.file("adapter_model.safetensors") as sink:
            sink.write(save({_peft(name): values for name, values in tensors.items()}, {"format": "pt"}))
        with folder.file("adapter_config.json", last=True) as sink:
            sink.write(json.dumps(settings, indent=2).encode())


def _adapters(source: Exported) -> list[str]:
    return [name for name in source.tensors if name.startswith("model.") and is_adapter(name)]


def _peft(name: str) -> str:
    """PEFT's name of an adapter's half."""
    matrix, _, half = name.rpartition(".")
    theirs = to_hf(f"{matrix}.weight")
    assert theirs is not None, name
    return f"base_model.model.{theirs.removesuffix('.weight')}.lora_{'A' if half == A else 'B'}.weight"
