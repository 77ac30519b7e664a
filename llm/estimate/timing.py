"""How long a step may take: a roofline over products, memory and exchanges. An estimate, to compare layouts by."""

from __future__ import annotations

from dataclasses import dataclass

from llm.estimate.flops import seen_positions
from llm.estimate.hardware import HardwareConfig
from llm.estimate.memory import kept_bytes, optimizer_bytes
from llm.estimate.parameters import adapter_parameters, block_parameters, stage_parameters
from llm.estimate.stages import split_layers
from llm.utils.config import LORA_OFF, DistConfig, LoraConfig, ModelConfig, TrainConfig, data_parallel, head_size

TOUCHED = 4  # times that the values kept for the backward pass go through memory: two writes and two reads


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on; exchanges only as far as products do not hide them."""

    products: float
    attention: float
    elementwise: float
    optimizer: float
    shards: float  # weights gathered, gradients reduced
    tensor: float
    context: float
    bubble: float

    @property
    def total(self) -> float:
        """Of a whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {name: float(getattr(self, name)) for name in self.__dataclass_fields__}


def step_time(
    model: ModelConfig,
    train: TrainConfig,
    dist: DistConfig,
    world_size: int,
    hardware: HardwareConfig,
    lora: LoraConfig = LORA_OFF,
) -> StepTime:
    """Of the slowest stage. Raises :class:`llm.utils.config.ConfigError` if the degrees do not fit."""
    dp = data_parallel(dist, world_size)
    passes = train.global_batch_size // (dp * train.micro_batch_size)
    positions = train.micro_batch_size * train.seq_len // dist.cp
    size = 2 if train.dtype == "bfloat16" else 4
    peak = 1e12 * (hardware.bf16_tflops if size == 2 else hardware.fp32_tflops)
    rate = hardware.achievable * peak
    in_blocks = rate
    if train.float8 != "off" and not train.float8_emulate and hardware.float8_tflops is not None:
        in_blocks = hardware.achievable * 1e12 * hardware.float8_tflops
    each_value = 4 if lora.rank else 6  # operations: frozen matrices have no gradients of their own

    stages = split_layers(model, train.seq_len, dist.pp * dist.pp_stages_per_rank)
    parts: list[StepTime] = []
    for rank in range(dist.pp):
        own = stages[rank :: dist.pp]
        layers = sum(len(stage) for stage in own)
        matrices = layers * block_parameters(model)[0] / dist.tp
        values = sum(sum(stage_parameters(model, stage)) for stage in own) / dist.tp
        head = model.vocab_size * model.dim / dist.tp if own[-1].stop == model.n_layers else 0
        again = 2 * (train.activation_checkpointing == "full")  # the forward pass twice
        products = passes * positions * (matrices * (each_value + again) / in_blocks + head * each_value / rate)
        # Causal attention looks at half of what it could see; its backward pass works the scores out once more.
        seen = sum(seen_positions(model, train.seq_len, stage) for stage in own) / 2
        each = 4 * seen * model.n_heads * head_size(model) / dist.tp
        attention = passes * positions * each * (3.5 + (train.activation_checkpointing == "full")) / rate
        kept = kept_bytes(model, train, dist, world_size, "none") * layers * positions
        elementwise = passes * TOUCHED * kept / (1e9 * hardware.memory_gb_s)

        shards = dp // dist.dp_replicate * dist.cp
        share = values / shards
        state = optimizer_bytes(model, train, matrices / shards, share - matrices / shards)
        reduced = values
        if lora.rank:
            reduced = adapter_parameters(model, lora, layers, dist.tp)
            share, state = reduced / shards, 8 * reduced / shards
        update = (12 * share + 2 * state + 12 * share * (train.ema_decay > 0)) / (1e9 * hardware.memory_gb_s)

        gathers = 2 if dist.reshard_after_forward else 1
        exchanged = passes * (values * gathers * size + reduced * 4) * (shards - 1) / shards
        exchange = exchanged / _bandwidth(hardware, dist.tp * dist.cp * dp // dist.dp_replicate)
        if dist.dp_replicate > 1:
            copies = 2 * 4 * share * (dist.dp_replicate - 1) / dist.dp_replicate
            exchange += passes * copies / _bandwidth(hardware, world_size // dist.pp)
        work = products + attention + elementwise
        sequence = 8 * layers * positions * model.dim * size * (dist.tp - 1) / dist.tp
        keys = 2 * head_size(model) * model.n_kv_heads / dist.tp
        rows = 2 * layers * positions * keys * size * (dist.cp - 1)
        tensor = passes * sequence / _bandwidth(hardware, dist.tp)
        context = passes * rows / _bandwidth(hardware, dist.tp * dist.cp)
        waiting = (dist.pp - 1) / (passes * dist.pp_stages_per_rank)  # of the time without it
        parts.append(
            StepTime(
                products=products,
                attention=attention,
                elementwise=elementwise,
                optimizer=update,
                shards=max(exchange - 0.9 * work, 0.1 * exchange),
                tensor=tensor,
                context=context,
                bubble=waiting * (work + tensor + context),
            )
        )
    return max(parts, key=lambda part: part.total)


def _bandwidth(hardware: HardwareConfig, extent: int) -> float:
    """Bytes per second of a group whose ranks lie within ``extent`` neighbours."""
    within = extent <= hardware.gpus_per_node
    return 1e9 * (hardware.intra_node_gb_s if within else hardware.inter_node_gb_s)
