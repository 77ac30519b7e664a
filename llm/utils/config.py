"""Typed configuration of a training run. Free of torch, so that the launcher can validate it before anything is queued.

Every struct rejects unknown keys and wrong types; rules that span several keys are in :func:`check`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class ConfigError(Exception):
    """A value that cannot work. One line: which key, which value, why, what to do."""


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration struct."""


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of a Llama-style decoder."""

    name: str
    vocab_size: PositiveInt
    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    ffn_dim: PositiveInt
    max_seq_len: PositiveInt
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Length, batch and optimizer of a run. Batch sizes count sequences."""

    max_steps: PositiveInt
    seq_len: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    lr: PositiveFloat
    min_lr_ratio: Fraction = 0.1
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    grad_clip: NonNegativeFloat = 1.0
    seed: NonNegativeInt = 0
    deterministic: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    log_every: PositiveInt = 1
    peak_tflops: PositiveFloat | None = None
    threads_per_rank: PositiveInt = 1


class DistConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model is spread over ranks. ``single`` is one rank; ``fsdp`` shards over all of them."""

    mode: Literal["single", "fsdp"]
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_s: PositiveInt = 300


class DataConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the text comes from. ``embedded:shakespeare`` ships with the package; else a path or an fsspec URL."""

    source: str
    tokenizer: Literal["bytes"] = "bytes"
    num_workers: NonNegativeInt = 0
    validation_fraction: Fraction = 0.05


class EvalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out loss during training (0 = only at the end) and the lines generated at the end."""

    every_steps: NonNegativeInt = 0
    batches: NonNegativeInt = 8
    sample_prompts: list[str] = []
    sample_tokens: NonNegativeInt = 120
    temperature: NonNegativeFloat = 0.8


class CheckpointConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to save, and what to keep. A stop request and the last step always save.

    ``every_steps`` and ``every_minutes`` are 0 for never; ``auto`` works the minutes out of what saves cost and how
    often the run is interrupted. ``keep_best`` names a number in the commits' state: ``evaluation_loss:min``.
    """

    every_steps: NonNegativeInt
    every_minutes: NonNegativeFloat | Literal["auto"] = 0.0
    asynchronous: bool = True
    snapshot_steps: NonNegativeInt = 0
    keep_last: PositiveInt = 3
    keep_every: NonNegativeInt = 0
    keep_best: str = ""
    save_seconds: PositiveFloat = 20.0


class TrainingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What ``python -m llm.train`` reads. Keys of the launcher in the same file are left to the launcher."""

    model: ModelConfig
    train: TrainConfig
    dist: DistConfig
    data: DataConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig


def load(source: str) -> TrainingConfig:
    """Read the YAML at ``source``, a path or an fsspec URL. The launcher's top-level keys are skipped.

    Raises :class:`ConfigError`.
    """
    import yaml

    try:
        if "://" in source:
            import fsspec

            with fsspec.open(source, "r") as stream:  # type: ignore[no-untyped-call]
                tree = yaml.safe_load(stream)
        else:
            tree = yaml.safe_load(Path(source).read_text())
        return msgspec.convert(tree, TrainingConfig)
    except OSError as error:
        raise ConfigError(f"{source}: cannot read the config: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error


def check(config: Any, world_size: int) -> None:
    """Refuse combinations that cannot train on ``world_size`` ranks.

    ``config`` has the fields of :class:`TrainingConfig`. Raises :class:`ConfigError`: the key, the value, the remedy.
    """
    model, train, dist = config.model, config.train, config.dist
    if model.dim % model.n_heads:
        raise ConfigError(
            f"model.n_heads={model.n_heads} does not divide model.dim={model.dim}: choose a head count that divides it"
        )
    if (model.dim // model.n_heads) % 2:
        raise ConfigError(
            f"model.dim/model.n_heads={model.dim // model.n_heads} is odd: rotary embeddings need an even head size"
        )
    if model.n_heads % model.n_kv_heads:
        raise ConfigError(
            f"model.n_kv_heads={model.n_kv_heads} does not divide model.n_heads={model.n_heads}: choose one that does"
        )
    if train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={train.seq_len} is longer than model.max_seq_len={model.max_seq_len}: "
            "lower the first or raise the second"
        )
    if dist.mode == "single" and world_size != 1:
        raise ConfigError(f"dist.mode=single runs on one rank, not {world_size}: use dist=fsdp or one rank")
    rows = train.micro_batch_size * world_size
    if train.global_batch_size % rows:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size x ranks = "
            f"{train.micro_batch_size} x {world_size} = {rows}: change one of them"
        )
    if train.warmup_steps > train.max_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} is more than train.max_steps={train.max_steps}: lower it"
        )
    if data_vocab(config.data.tokenizer) > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the {data_vocab(config.data.tokenizer)} tokens of "
            f"data.tokenizer={config.data.tokenizer}: raise it"
        )


def data_vocab(tokenizer: str) -> int:
    """Number of distinct tokens of a tokenizer known by name."""
    return {"bytes": 256}[tokenizer]
