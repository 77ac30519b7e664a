"""How many trained values a model has, and how many of them each rank of a layout works with."""

from __future__ import annotations

from llm.utils.config import LoraConfig, ModelConfig, head_size, target_shapes


def parameter_count(config: ModelConfig) -> int:
    """Number of trained values, from the shape alone."""
    matrices, rest = block_parameters(config)
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return config.n_layers * (matrices + rest) + embeddings + config.dim


def block_parameters(config: ModelConfig) -> tuple[int, int]:
    """Values of one layer: of its matrices, and of its norms and biases."""
    size, width = head_size(config), config.dim
    queries, keys = size * config.n_heads, size * config.n_kv_heads
    matrices = 2 * width * (queries + keys) + 3 * width * config.ffn_dim
    biases = (queries + 2 * keys) * config.qkv_bias + width * config.out_bias
    biases += (2 * config.ffn_dim + width) * config.ffn_bias
    return matrices, biases + 2 * width + 2 * size * config.qk_norm


def stage_parameters(config: ModelConfig, layers: range) -> tuple[int, int]:
    """Values of a pipeline's stage with ``layers``: of its blocks, and of what is around them.

    The first stage has the embedding, the last one the output matrix and the norm before it. A tied matrix is held by
    both, and once where they are the same stage.
    """
    first, last = layers.start == 0, layers.stop == config.n_layers
    tables = 1 if first and last and config.tie_embeddings else first + last
    return len(layers) * sum(block_parameters(config)), tables * config.vocab_size * config.dim + last * config.dim


def adapter_parameters(
    config: ModelConfig, lora: LoraConfig, layers: int | None = None, tp: int = 1, shards: int = 1
) -> int:
    """Values of the adapters of ``layers`` (all) on the first of ``shards`` x ``tp`` ranks; 0 without adapters.

    Of each half one is split over ``tp`` as its matrix is, and the other whole (:mod:`llm.train.lora`). Shards are of
    whole rows, and A has only ``lora.rank`` of them: the first ranks may have all.
    """
    layers = config.n_layers if layers is None else layers
    shapes = target_shapes(config)
    total = 0
    for name in lora.targets if lora.rank else ():
        out, inner = shapes[name]
        if name in ("wo", "down"):
            inner //= tp
        else:
            out //= tp
        total += -(-lora.rank // shards) * inner + -(-out // shards) * lora.rank
    return layers * total
