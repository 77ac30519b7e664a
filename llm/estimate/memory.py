"""Bytes that a rank needs, by kind, from the shapes alone; :mod:`llm.tools.profile_memory` holds them against runs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llm.estimate.parameters import adapter_parameters, block_parameters, stage_parameters
from llm.estimate.stages import split_layers
from llm.utils.config import (
    LORA_OFF,
    DistConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    data_parallel,
    head_size,
    target_shapes,
)

BLOCK = 64  # values that share a scale in adamw8bit
FEWEST = 4096  # values of a matrix that it treats so


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    ``weights``, ``gradients``, ``optimizer`` and ``average`` last, this rank's shards of them. ``activations`` are what
    the forward pass leaves for the backward pass; ``gathered`` the whole weights and gradients of the blocks at work;
    ``workspace`` what is held for a moment at the peak: a chunk of logits, a block that is recomputed.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    gathered: float
    workspace: float

    @property
    def state(self) -> float:
        """What a rank holds between two steps, with its gradients."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def total(self) -> float:
        """At the peak of a step."""
        return self.state + self.activations + self.gathered + self.workspace

    def kinds(self) -> dict[str, float]:
        """Bytes by kind."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


def memory(
    model: ModelConfig, train: TrainConfig, dist: DistConfig, world_size: int, lora: LoraConfig = LORA_OFF
) -> Memory:
    """Of the rank that needs most. Raises :class:`llm.utils.config.ConfigError` if the degrees do not fit.

    Under ``lora`` gradients, optimizer and average are those of the adapters; activations are taken to be as without,
    which is a little too much.
    """
    ranks = [memory_of(model, train, dist, world_size, lora, rank) for rank in range(dist.pp)]
    return max(ranks, key=lambda rank: rank.total)


def optimizer_bytes(model: ModelConfig, train: TrainConfig, matrices: float, rest: float) -> float:
    """State of the optimizer for so many values of blocks' matrices, and of all else.

    AdamW has two moments in float32; Muon one momentum in float32 for matrices, and AdamW's two for the rest.
    ``adamw8bit`` keeps two bytes and two float32 scales for every 64 values of rows that are made of such blocks.
    """
    if train.optimizer == "adamw8bit":
        quantised = 2 + 2 * 4 / BLOCK
        share = _in_blocks(model)
        return matrices * (share * quantised + (1 - share) * 8) + rest * (8 if model.dim % BLOCK else quantised)
    return matrices * (4 if train.optimizer == "muon" else 8) + rest * 8


def _in_blocks(model: ModelConfig) -> float:
    """Share of a layer's matrices' values whose rows are multiples of a block of quantised moments."""
    heads = head_size(model) * model.n_heads
    inner = model.dim * model.ffn_dim
    total = block_parameters(model)[0]
    by_columns = ((heads, heads * model.dim), (model.ffn_dim, inner))  # attention's output, down
    outside = sum(values for columns, values in by_columns if columns % BLOCK)
    if model.dim % BLOCK:
        outside += total - heads * model.dim - inner
    return 1 - outside / total


def checkpoint_bytes(model: ModelConfig, train: TrainConfig, lora: LoraConfig = LORA_OFF) -> float:
    """Of one whole checkpoint: float32 weights, the optimizer's state, and the average if there is one; under ``lora``
    of the adapters alone."""
    if lora.rank:
        each = 4 + 4 * (train.ema_decay > 0) + _adapter_state(model, train, lora)
        return adapter_parameters(model, lora) * each
    blocks, around = stage_parameters(model, range(model.n_layers))
    matrices = model.n_layers * block_parameters(model)[0]
    total = blocks + around
    return total * (4 + 4 * (train.ema_decay > 0)) + optimizer_bytes(model, train, matrices, total - matrices)


def _adapter_state(model: ModelConfig, train: TrainConfig, lora: LoraConfig) -> float:
    """Bytes of optimizer state for each value of adapters, on average."""
    if train.optimizer != "adamw8bit":
        return 8.0
    shapes = [target_shapes(model)[name] for name in lora.targets]
    sizes = [(lora.rank * inner, inner) for _, inner in shapes] + [(out * lora.rank, lora.rank) for out, _ in shapes]
    inside = sum(size for size, columns in sizes if size >= FEWEST and columns % BLOCK == 0)
    share = inside / sum(size for size, _ in sizes)
    return share * (2 + 2 * 4 / BLOCK) + (1 - share) * 8


def memory_of(
    model: ModelConfig,
    train: TrainConfig,
    dist: DistConfig,
    world_size: int,
    lora: LoraConfig,
    rank: int,
) -> Memory:
    """Of a rank that is ``rank``-th along the pipeline."""
    stages = split_layers(model, train.seq_len, dist.pp * dist.pp_stages_per_rank)
    own = stages[rank :: dist.pp]
    dp = data_parallel(dist, world_size)
    shards = dp // dist.dp_replicate * dist.cp
    size = 2 if train.dtype == "bfloat16" else 4
    layers = sum(len(stage) for stage in own)
    blocks = sum(stage_parameters(model, stage)[0] for stage in own) / dist.tp
    around = sum(stage_parameters(model, stage)[1] for stage in own) / dist.tp
    matrices = layers * block_parameters(model)[0] / dist.tp
    values = trained = (blocks + around) / shards
    optimizer = optimizer_bytes(model, train, matrices / shards, values - matrices / shards)
    if lora.rank:
        trained = adapter_parameters(model, lora, layers, dist.tp, shards)
        values, optimizer = values + trained, trained * _adapter_state(model, train, lora)
    last = own[-1].stop == model.n_layers
    positions = train.micro_batch_size * train.seq_len // dist.cp

    per_layer = positions * kept_bytes(model, train, dist, world_size)
    flight = _in_flight(train, dist, dp, rank)  # micro-batches, each of one stage of this rank
    activations = per_layer * layers / len(own) * flight
    workspace, head_gradients = 0.0, 0.0
    if last:
        workspace, kept = _loss(model, train, dist, positions, size)
        stream = 4 if world_size == 1 else size
        activations += positions * model.dim * (2 * stream + size)
        head_gradients = kept
    everything = positions * kept_bytes(model, train, dist, world_size, "none")
    recomputed = 0.0 if train.activation_checkpointing == "none" else everything - per_layer
    if train.activation_checkpointing == "full":
        recomputed = everything
    workspace = max(workspace, head_gradients + recomputed + positions * (model.dim + model.ffn_dim / dist.tp) * size)

    block = blocks / max(layers, 1)
    gathered = 0.0
    if world_size > 1:
        # Two blocks while the next one is fetched, and the gradient of one, also as float32 for its reduction. What is
        # around the blocks stays whole from forward to backward.
        held = 2 * block if dist.reshard_after_forward else blocks
        reduced = adapter_parameters(model, lora, 1, dist.tp) if lora.rank else block
        gathered = size * (held + around) + (size + 4) * reduced
        # At the end activations are gone, and the gradients of what is around the blocks are reduced.
        if not lora.rank:
            gathered = max(gathered, (2 * size + 4) * around - activations - workspace)
    elif size == 2:
        # Autocast's copies of weights last as long as what is kept for the backward pass refers to them.
        gathered = 2.0 * (block if train.activation_checkpointing == "full" else blocks + around)
    return Memory(
        weights=4 * values,
        gradients=4 * trained,
        optimizer=optimizer,
        average=4 * trained if train.ema_decay else 0.0,
        activations=activations,
        gathered=gathered,
        workspace=workspace,
    )


def kept_bytes(
    model: ModelConfig, train: TrainConfig, dist: DistConfig, world_size: int, checkpointing: str | None = None
) -> float:
    """Bytes per position of this rank that a block leaves for its backward pass, on average over tensor-parallel ranks.

    Without checkpointing: two residual streams and their norms' outputs, queries, keys, values, attention's output and
    its log-sums, and of the feed-forward gate, its SiLU, up and their product. Attention keeps no scores.
    """
    checkpointing = checkpointing or train.activation_checkpointing
    size = 2 if train.dtype == "bfloat16" else 4
    width, inner = model.dim, model.ffn_dim / dist.tp
    queries, keys = (head_size(model) * heads / dist.tp for heads in (model.n_heads, model.n_kv_heads))
    stream = width / dist.tp
    casts = train.dtype == "bfloat16" and world_size == 1  # autocast: a float32 stream, a copy for each product
    stream_size = 4 if casts else size
    if checkpointing == "full":
        return stream_size * stream
    if checkpointing == "selective":
        return stream_size * stream + size * (2 * stream + 2 * queries + 2 * keys + 2 * inner)
    norms = (5 if casts else 2) * width  # tensor-parallel products take whole positions, gathered
    sums = 4 * model.n_heads / dist.tp
    normed = 2 * size * (queries + keys) / 2 if model.qk_norm else 0.0
    return 2 * stream_size * stream + size * (norms + 2 * queries + 2 * keys * dist.cp + 4 * inner) + sums + normed


def _loss(model: ModelConfig, train: TrainConfig, dist: DistConfig, positions: int, size: int) -> tuple[float, float]:
    """Bytes held while the loss is worked out, and those that it leaves: gradients of its input and of the matrix."""
    vocab, chunk = model.vocab_size / dist.tp, min(train.loss_chunk, positions)
    logits = chunk * vocab * (4 if size == 4 else 6)
    matrix = vocab * model.dim
    several = positions > chunk
    left = matrix * size + positions * model.dim * size
    sums = matrix * (4 + (size if size == 2 else 0)) if several else matrix * size
    return logits + sums + positions * model.dim * size, left


def kept_by_loss(model: ModelConfig, train: TrainConfig, dist: DistConfig) -> float:
    """Bytes that the loss leaves for the backward pass of one micro-batch, on the last stage."""
    positions = train.micro_batch_size * train.seq_len // dist.cp
    return _loss(model, train, dist, positions, 2 if train.dtype == "bfloat16" else 4)[1]


def _in_flight(train: TrainConfig, dist: DistConfig, dp: int, rank: int) -> float:
    """Passes of one stage whose activations a pipeline's rank holds at once.

    1F1B: Narayanan et al., "PipeDream", 2019; interleaved: Narayanan et al., "Efficient Large-Scale Language Model
    Training", 2021, section 2.2.
    """
    if dist.pp == 1:
        return 1
    passes = train.global_batch_size // (dp * train.micro_batch_size)
    stages = dist.pp_stages_per_rank
    if stages == 1:
        return min(dist.pp - rank, passes)
    return min(2 * (dist.pp - rank - 1) + (stages - 1) * dist.pp + 1, passes * stages)
