"""Which layers each stage of a pipeline has."""

from __future__ import annotations

from llm.utils.config import ModelConfig, head_size


def layer_cost(model: ModelConfig, seq_len: int) -> float:
    """Multiplications per token of one block: its matrices, and the scores and values of causal attention."""
    heads = head_size(model) * (model.n_heads + model.n_kv_heads)
    seen = seq_len if model.window is None else min(seq_len, model.window)
    return 2.0 * model.dim * heads + 3.0 * model.dim * model.ffn_dim + head_size(model) * model.n_heads * seen


def split_layers(model: ModelConfig, seq_len: int, stages: int) -> list[range]:
    """Layers of each stage, at least one, such that the costliest stage costs as little as it can.

    The last stage also has the output matrix, whose product is counted; looking up an embedding costs nothing.
    """
    layer, head = layer_cost(model, seq_len), float(model.dim * model.vocab_size)
    best: tuple[float, int] | None = None
    for last in range(1, model.n_layers - stages + 2) if stages > 1 else [model.n_layers]:
        rest = -(-(model.n_layers - last) // (stages - 1)) if stages > 1 else 0
        worst = max(last * layer + head, rest * layer)
        if best is None or worst <= best[0]:  # of equals, the most even one
            best = worst, last
    assert best is not None
    counts = [*_even(model.n_layers - best[1], stages - 1), best[1]]
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def _even(total: int, parts: int) -> list[int]:
    """``total`` in ``parts``, the larger ones first: the first stages wait least for others."""
    return [total // parts + (part < total % parts) for part in range(parts)] if parts else []
