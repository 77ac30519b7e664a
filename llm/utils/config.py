"""Typed configuration of a training run. Free of torch, so that the launcher can validate it before anything is queued.

Every struct rejects unknown keys and wrong types; rules that span several keys are in :func:`check`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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


class RopeScaling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rotary angles are stretched beyond the context that a model was trained with.

    ``llama3`` slows the slow frequencies down (Llama 3.1); ``yarn`` blends by wavelength and sharpens attention
    (Peng et al., "YaRN", 2023). ``attention_factor`` null = YaRN's own, 0.1 ln(factor) + 1.
    """

    kind: Literal["llama3", "yarn"]
    factor: Annotated[float, Meta(ge=1)]
    original_max_seq_len: PositiveInt
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of a Llama-style decoder, wide enough for the weights of Llama 2/3, Qwen 2/3 and Mistral.

    ``head_dim`` null = dim / n_heads. ``window`` is the number of tokens, itself included, that a position of a
    sliding-window layer sees; every ``full_every``-th layer sees all (0 = no layer does). ``init`` says how weights
    are drawn; ``mup_base_dim`` is the width at which muP's rules change nothing.
    """

    name: str
    vocab_size: PositiveInt
    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    ffn_dim: PositiveInt
    max_seq_len: PositiveInt
    head_dim: PositiveInt | None = None
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    window: PositiveInt | None = None
    full_every: NonNegativeInt = 0
    init: Literal["depth_scaled", "mup"] = "depth_scaled"
    mup_base_dim: PositiveInt = 256


def head_size(model: ModelConfig) -> int:
    """Values of one attention head."""
    return model.head_dim or model.dim // model.n_heads


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Length, batch and optimizer of a run. Batch sizes count sequences.

    The run ends at ``max_steps``, or before where ``max_tokens`` or ``max_hours`` (of training, over all attempts) are
    reached first. The learning rate follows ``schedule``; ``decay_steps`` is the length of wsd's fall. With
    ``batch_warmup_steps`` the global batch grows evenly from ``first_batch_size`` in multiples of it. A new run starts
    from the weights of the Hugging Face folder ``init_from``, where it names one. ``float8`` says how far values share
    a scale where the blocks' products are worked out in it; emulated, they are only rounded to it, on any device.
    """

    max_steps: PositiveInt
    max_tokens: PositiveInt | None = None
    max_hours: PositiveFloat | None = None
    seq_len: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    first_batch_size: PositiveInt | None = None
    batch_warmup_steps: NonNegativeInt = 0
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: PositiveFloat
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    min_lr_ratio: Fraction = 0.1
    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    muon_momentum: Fraction = 0.95
    grad_clip: NonNegativeFloat = 1.0
    ema_decay: Fraction = 0.0
    z_loss: NonNegativeFloat = 0.0
    loss_chunk: PositiveInt = 4096
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    skip_spikes: NonNegativeFloat = 0.0
    max_skips: PositiveInt = 10
    init_from: str | None = None
    seed: NonNegativeInt = 0
    deterministic: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    log_every: PositiveInt = 1
    peak_tflops: PositiveFloat | None = None
    threads_per_rank: PositiveInt = 1
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    float8_emulate: bool = False


class DistConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model is spread over ranks; the product of all degrees is the number of ranks.

    ``dp_replicate`` copies of ``dp_shard`` (auto = all ranks that are left) shards each: HSDP and FSDP. ``tp`` ranks
    share every matrix, ``cp`` ranks every sequence, ``pp`` ranks the layers. See :mod:`llm.train.dist`.
    """

    dp_replicate: PositiveInt = 1
    dp_shard: PositiveInt | Literal["auto"] = "auto"
    cp: PositiveInt = 1
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    pp_schedule: Literal["1f1b", "interleaved"] = "1f1b"
    pp_stages_per_rank: PositiveInt = 1
    reshard_after_forward: bool = True
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_s: PositiveInt = 300


class MixtureSource(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source among several. ``weight`` is its share of the samples, relative to the others', or changes with the
    step: ``[[1, 0.8], [5000, 0.5]]`` is 0.8 from step 1 on and 0.5 from step 5000 on."""

    source: str
    weight: PositiveFloat | list[tuple[PositiveInt, NonNegativeFloat]] = 1.0


class DataConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained on: one ``source``, or a ``mixture`` of several by name.

    A source is ``embedded:shakespeare``, which ships with the package; the folder of a dataset that
    ``llm.tools.prepare_data`` has made; or a text, read as bytes, whose end is held out. Paths or fsspec URLs.
    """

    source: str | None
    mixture: dict[str, MixtureSource] = {}
    tokenizer: str | None = None
    epochs: PositiveInt | None = None
    document_mask: bool = True
    num_workers: NonNegativeInt = 2
    prefetch: PositiveInt = 4
    cache_gb: NonNegativeFloat = 10.0
    cache_dir: str | None = None
    validation_fraction: Fraction = 0.05


class PrepareConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``python -m llm.tools.prepare_data`` makes of text: a dataset of tokens (:mod:`llm.data.format`).

    ``input``: paths, fsspec URLs and globs of them. ``field`` null is ``text``, with ``chat`` ``messages``.
    ``train_tokenizer`` is the size of a vocabulary that is learnt from ``tokenizer_mb`` MB of the input. ``pack`` is a
    ``seq_len``. Documents whose text is no longer than ``min_chars`` - 1, longer than ``max_chars``, has a smaller part
    of letters than ``min_alpha``, matches ``drop``, or has other values than ``keep`` (``field=value``) are left out.
    ``unit_mb`` MB of input are done, and done again, as one. ``wait_s``: of silence from the other ranks.
    """

    input: list[str] = []
    output: str | None = None
    tokenizer: str = "bytes"
    train_tokenizer: Annotated[int, Meta(ge=259)] | None = None
    tokenizer_mb: PositiveFloat = 256.0
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    field: str | None = None
    paragraphs: bool = False
    chat: bool = False
    pack: PositiveInt | None = None
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    validation: Fraction = 0.005
    seed: NonNegativeInt = 0
    deduplicate: bool = False
    min_chars: PositiveInt = 1
    max_chars: PositiveInt | None = None
    min_alpha: Fraction = 0.0
    drop: str | None = None
    keep: list[str] = []
    max_bad_fraction: Fraction = 0.001
    unit_mb: PositiveFloat = 64.0
    workers: PositiveInt | None = None
    overwrite: bool = False
    wait_s: PositiveFloat = 3600.0


class EvalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out loss during training (0 = only at the end) and the lines generated at the end; from ``every`` on, the
    scores of checkpoints in tasks (:mod:`llm.eval`).

    ``tasks`` are names of the harness (tasks, groups, tags), found beside ``llm.eval``, in ``task_dir`` and, with
    ``hub``, among its own, or ``humaneval``. ``every`` = ``commit`` submits a run beside the training's that scores
    each of its commits, on ``ranks`` ranks of one node. ``limit`` counts a task's examples. ``stride``: tokens of a
    long text that are scored at a time, with as many before them as fit; null = the harness's own way. ``code_*`` and
    ``pass_at`` are for programs that the model writes, which are run with ``run_code`` alone.
    """

    every_steps: NonNegativeInt = 0
    batches: NonNegativeInt = 8
    sample_prompts: list[str] = []
    sample_tokens: NonNegativeInt = 120
    temperature: NonNegativeFloat = 0.8
    every: Literal["never", "commit"] = "never"
    ranks: PositiveInt = 1
    wait_hours: PositiveFloat = 24.0
    tasks: list[str] = msgspec.field(default_factory=lambda: ["local_choice", "local_passages", "local_echo"])
    task_dir: str | None = None
    hub: bool = False
    limit: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None
    batch_size: PositiveInt = 16
    max_gen_tokens: PositiveInt = 256
    stride: PositiveInt | None = None
    add_bos: bool = False
    seed: NonNegativeInt = 1234
    log_samples: bool = False
    run_code: bool = False
    code_samples: PositiveInt = 1
    code_temperature: NonNegativeFloat = 0.0
    pass_at: list[PositiveInt] = msgspec.field(default_factory=lambda: [1])
    code_seconds: PositiveFloat = 10.0
    code_memory_mb: PositiveInt = 1024


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


class LoggingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the metrics go beside the run directory, which always has them as JSON lines.

    ``wandb`` offline writes a folder that ``wandb sync`` sends later. ``trace`` has every rank write what it did when.
    """

    tensorboard: bool = False
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "llmops"
    trace: bool = False


class ProfileConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tools for finding out where time and memory go. ``steps`` are recorded by torch's profiler, on ``rank``.

    ``memory`` dumps the allocator's history when a GPU is out of memory; ``nvtx`` marks the parts of a step for Nsight.
    """

    steps: list[PositiveInt] = []
    rank: NonNegativeInt = 0
    memory: bool = False
    nvtx: bool = False


Target = Literal["wq", "wk", "wv", "wo", "gate", "up", "down"]


class LoraConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al., "LoRA", 2021): the model is frozen, and each matrix W of ``targets`` works as
    W + ``alpha`` / ``rank`` x B A, of which A (rank, in) and B (out, rank) are trained. ``rank`` 0 = all is trained.
    """

    rank: NonNegativeInt = 0
    alpha: PositiveFloat = 16.0
    targets: list[Target] = msgspec.field(default_factory=lambda: ["wq", "wk", "wv", "wo", "gate", "up", "down"])

    @property
    def scale(self) -> float:
        """What the product of the two is multiplied by."""
        return self.alpha / self.rank


LORA_OFF = LoraConfig()


class TrainingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What ``python -m llm.train`` reads. Keys of the launcher in the same file are left to the launcher."""

    model: ModelConfig
    train: TrainConfig
    dist: DistConfig
    data: DataConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    lora: LoraConfig = LORA_OFF


class EvaluationConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What ``python -m llm.eval`` reads: which commits of which run (a path or URL) are scored, and how.

    ``step`` is one step, ``newest``, or ``every`` one that has no score yet; with ``follow`` also those that a training
    which goes on will commit. ``dist`` spreads the model over the ranks. Other keys in the same file are left alone.
    """

    run: str | None = None
    step: PositiveInt | Literal["newest", "every"] = "newest"
    follow: bool = False
    eval: EvalConfig = msgspec.field(default_factory=lambda: EvalConfig())
    dist: DistConfig = msgspec.field(default_factory=lambda: DistConfig())


def target_shapes(model: ModelConfig) -> dict[Target, tuple[int, int]]:
    """(out, in) of each matrix of a block."""
    size = head_size(model)
    queries, keys = model.n_heads * size, model.n_kv_heads * size
    dim, inner = model.dim, model.ffn_dim
    return {
        "wq": (queries, dim), "wk": (keys, dim), "wv": (keys, dim), "wo": (dim, queries),
        "gate": (inner, dim), "up": (inner, dim), "down": (dim, inner),
    }  # fmt: skip


T = TypeVar("T", bound=Struct)


def load(source: str) -> TrainingConfig:
    """Read the YAML at ``source``, a path or an fsspec URL. The launcher's top-level keys are skipped.

    Raises :class:`ConfigError`.
    """
    return read(source, TrainingConfig)


def read(source: str, kind: type[T]) -> T:
    """The YAML at ``source``, a path or an fsspec URL, as ``kind``. Raises :class:`ConfigError`."""
    import yaml

    try:
        if "://" in source:
            import fsspec

            with fsspec.open(source, "r") as stream:  # type: ignore[no-untyped-call]
                tree = yaml.safe_load(stream)
        else:
            tree = yaml.safe_load(Path(source).read_text())
        return msgspec.convert(tree, kind)
    except OSError as error:
        raise ConfigError(f"{source}: cannot read the config: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error


def data_parallel(dist: DistConfig, world_size: int) -> int:
    """How many rows of a batch are worked on at the same time: ranks / (cp x tp x pp).

    Raises :class:`ConfigError` when the degrees do not make up ``world_size``.
    """
    others = dist.cp * dist.tp * dist.pp
    wanted = f"{dist.dp_replicate} x {dist.dp_shard} x {dist.cp} x {dist.tp} x {dist.pp}"
    shard = dist.dp_shard
    if shard == "auto":
        shard = world_size // (dist.dp_replicate * others)
    if dist.dp_replicate * shard * others != world_size:
        raise ConfigError(
            f"dist.dp_replicate x dp_shard x cp x tp x pp = {wanted} does not make up {world_size} "
            f"rank{'s' if world_size > 1 else ''}: change a degree or the number of ranks"
        )
    return dist.dp_replicate * shard


def check(config: Any, world_size: int) -> None:
    """Refuse combinations that cannot train on ``world_size`` ranks.

    ``config`` has the fields of :class:`TrainingConfig`. Raises :class:`ConfigError`: the key, the value, the remedy.
    """
    _check_model(config.model)
    _check_layout(config, world_size)
    _check_batches(config.train, data_parallel(config.dist, world_size))
    _check_rates(config.train)
    _check_lora(config.model, config.train, config.lora)
    _check_float8(config.model, config.train, config.dist)
    model, train = config.model, config.train
    if train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={train.seq_len} is longer than model.max_seq_len={model.max_seq_len}: "
            "lower the first or raise the second"
        )
    _check_data(config.data)


def _check_data(data: DataConfig) -> None:
    if (data.source is None) == (not data.mixture):
        raise ConfigError(
            f"data.source={data.source} and data.mixture with {len(data.mixture)} sources: set exactly one of them"
        )
    for name, each in data.mixture.items():
        if not isinstance(each.weight, float | int):
            steps = [step for step, _ in each.weight]
            if not steps or steps[0] != 1 or steps != sorted(set(steps)):
                raise ConfigError(
                    f"data.mixture.{name}.weight={each.weight}: give [step, weight] pairs in order, the first at step 1"
                )
    changes = {
        step: [
            next((share for first, share in reversed(each.weight) if first <= step), 0.0)
            for each in data.mixture.values()
            if not isinstance(each.weight, float | int)
        ]
        for other in data.mixture.values()
        if not isinstance(other.weight, float | int)
        for step, _ in other.weight
    }
    fixed = any(isinstance(each.weight, float | int) for each in data.mixture.values())
    if not fixed and (empty := [step for step, shares in changes.items() if not any(shares)]):
        raise ConfigError(f"data.mixture: all weights are 0 from step {empty[0]} on: leave one above 0")


def _check_model(model: ModelConfig) -> None:
    if model.head_dim is None and model.dim % model.n_heads:
        raise ConfigError(
            f"model.n_heads={model.n_heads} does not divide model.dim={model.dim}: choose a head count that divides it"
        )
    if head_size(model) % 2:
        raise ConfigError(
            f"model.dim/model.n_heads={head_size(model)} is odd: rotary embeddings need an even head size"
            if model.head_dim is None
            else f"model.head_dim={model.head_dim} is odd: rotary embeddings need an even head size"
        )
    if model.n_heads % model.n_kv_heads:
        raise ConfigError(
            f"model.n_kv_heads={model.n_kv_heads} does not divide model.n_heads={model.n_heads}: choose one that does"
        )
    if model.full_every and model.window is None:
        raise ConfigError(f"model.full_every={model.full_every} needs model.window: set it, or full_every=0")
    scaling = model.rope_scaling
    if (
        scaling is not None
        and scaling.kind == "yarn"
        and model.max_seq_len > scaling.factor * scaling.original_max_seq_len
    ):
        raise ConfigError(
            f"model.max_seq_len={model.max_seq_len} is longer than model.rope_scaling was built for "
            f"({scaling.factor:g} x {scaling.original_max_seq_len}): lower it or raise rope_scaling.factor"
        )


def _check_layout(config: Any, world_size: int) -> None:
    model, train, dist = config.model, config.train, config.dist
    data_parallel(dist, world_size)
    for key, value in (
        ("model.n_heads", model.n_heads),
        ("model.n_kv_heads", model.n_kv_heads),
        ("model.ffn_dim", model.ffn_dim),
        ("model.vocab_size", model.vocab_size),
    ):
        if value % dist.tp:
            raise ConfigError(f"dist.tp={dist.tp} does not divide {key}={value}: choose a degree that does")
    if train.optimizer == "adamw8bit" and dist.tp > 1:
        for key, columns in (
            ("model.ffn_dim", model.ffn_dim),
            ("n_heads x head size", model.n_heads * head_size(model)),
        ):
            if columns % 64 == 0 and columns // dist.tp % 64:
                raise ConfigError(
                    f"train.optimizer=adamw8bit: dist.tp={dist.tp} leaves {columns // dist.tp} columns of {key}="
                    f"{columns}, which are no blocks of 64: lower dist.tp or choose train.optimizer=adamw"
                )
    if train.seq_len % (2 * dist.cp if dist.cp > 1 else 1):
        raise ConfigError(
            f"train.seq_len={train.seq_len} is not a multiple of 2 x dist.cp={2 * dist.cp}, the parts of a sequence"
        )
    if train.seq_len // dist.cp % dist.tp:
        raise ConfigError(
            f"dist.tp={dist.tp} does not divide the {train.seq_len // dist.cp} positions of a rank "
            f"(train.seq_len / dist.cp): choose a degree that does"
        )
    stages = dist.pp * dist.pp_stages_per_rank
    if dist.pp == 1 and dist.pp_stages_per_rank > 1:
        raise ConfigError(f"dist.pp_stages_per_rank={dist.pp_stages_per_rank} needs dist.pp of 2 or more")
    if dist.pp_schedule == "interleaved" and dist.pp_stages_per_rank < 2:
        raise ConfigError("dist.pp_schedule=interleaved needs dist.pp_stages_per_rank of 2 or more")
    if dist.pp_schedule == "1f1b" and dist.pp_stages_per_rank > 1:
        raise ConfigError(
            f"dist.pp_stages_per_rank={dist.pp_stages_per_rank} needs dist.pp_schedule=interleaved: 1f1b has one stage"
        )
    if stages > model.n_layers:
        raise ConfigError(
            f"dist.pp x pp_stages_per_rank = {stages} stages are more than model.n_layers={model.n_layers}: lower one"
        )
    if dist.pp > 1:
        passes = train.global_batch_size // (data_parallel(dist, world_size) * train.micro_batch_size)
        if passes < dist.pp or (dist.pp_schedule == "interleaved" and passes % dist.pp):
            raise ConfigError(
                f"dist.pp={dist.pp} wants at least as many micro-batches in a step"
                f"{', and a multiple of it' if dist.pp_schedule == 'interleaved' else ''}; there are {passes}: "
                "lower train.micro_batch_size or raise train.global_batch_size"
            )


def _check_batches(train: TrainConfig, data_parallel: int) -> None:
    rows = train.micro_batch_size * data_parallel
    if train.global_batch_size % rows:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size x "
            f"data-parallel ranks = {train.micro_batch_size} x {data_parallel} = {rows}: change one of them"
        )
    first = train.first_batch_size
    if (first is None) != (train.batch_warmup_steps == 0):
        raise ConfigError("train.first_batch_size and train.batch_warmup_steps go together: set both or none")
    if first is not None and (first % rows or train.global_batch_size % first):
        raise ConfigError(
            f"train.first_batch_size={first} must be a multiple of train.micro_batch_size x data-parallel ranks = "
            f"{rows} and divide train.global_batch_size={train.global_batch_size}: change one of them"
        )


def _check_rates(train: TrainConfig) -> None:
    if train.warmup_steps > train.max_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} is more than train.max_steps={train.max_steps}: lower it"
        )
    if (train.schedule == "wsd") != (train.decay_steps > 0):
        raise ConfigError(
            f"train.decay_steps={train.decay_steps} with train.schedule={train.schedule}: "
            "wsd needs the length of its fall, and only wsd has one"
        )
    if train.warmup_steps + train.decay_steps > train.max_steps:
        raise ConfigError(
            f"train.warmup_steps + decay_steps = {train.warmup_steps + train.decay_steps} is more than "
            f"train.max_steps={train.max_steps}: lower one of them"
        )


def _check_lora(model: ModelConfig, train: TrainConfig, lora: LoraConfig) -> None:
    if not lora.rank:
        return
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise ConfigError(f"lora.targets=[{','.join(lora.targets)}]: name one matrix or more, and each only once")
    shapes = target_shapes(model)
    name, least = min(((name, min(shapes[name])) for name in lora.targets), key=lambda each: each[1])
    if lora.rank > least:
        raise ConfigError(f"lora.rank={lora.rank} is more than the {least} rows or columns of {name}: lower it")
    if train.optimizer == "muon":
        raise ConfigError(
            "train.optimizer=muon makes whole matrices orthogonal, and adapters are halves of one: "
            "choose adamw or adamw8bit, or lora.rank=0"
        )
    if model.init == "mup":
        raise ConfigError("model.init=mup has no rules for adapters: choose depth_scaled, or lora.rank=0")


FLOAT8_MULTIPLE = 16  # rows and columns that the kernels of float8 products take


def _check_float8(model: ModelConfig, train: TrainConfig, dist: DistConfig) -> None:
    if train.float8 == "off":
        return
    if train.dtype != "bfloat16":
        raise ConfigError(f"train.float8={train.float8} needs train.dtype=bfloat16 for all that is not a product")
    positions = train.micro_batch_size * train.seq_len // dist.cp
    if positions % FLOAT8_MULTIPLE:
        raise ConfigError(
            f"train.float8={train.float8}: the {positions} positions of a micro-batch on a rank are no multiple of "
            f"{FLOAT8_MULTIPLE}: change train.seq_len or train.micro_batch_size"
        )
    size = head_size(model)
    for key, value in (
        ("model.dim", model.dim),
        ("model.n_heads x head size / dist.tp", model.n_heads * size // dist.tp),
        ("model.n_kv_heads x head size / dist.tp", model.n_kv_heads * size // dist.tp),
        ("model.ffn_dim / dist.tp", model.ffn_dim // dist.tp),
    ):
        if value % FLOAT8_MULTIPLE:
            raise ConfigError(
                f"train.float8={train.float8}: {key} = {value} is no multiple of {FLOAT8_MULTIPLE}: "
                "choose another shape or layout, or train.float8=off"
            )
