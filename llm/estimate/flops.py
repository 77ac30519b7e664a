"""Floating-point operations of a trained token."""

from __future__ import annotations

from llm.estimate.parameters import adapter_parameters, parameter_count
from llm.utils.config import LORA_OFF, LoraConfig, ModelConfig, head_size


def flops_per_token(model: ModelConfig, seq_len: int, lora: LoraConfig = LORA_OFF) -> float:
    """FLOPs that one trained token takes, forward and backward, as in appendix B of the PaLM paper.

    ``6 N + 12 H E sum(S)``: N parameters that are multiplied with (all but the embedding, whose rows are only looked
    up; the output head counts, also when it shares the embedding's values), H heads of E values, and for each layer the
    S positions that a query could see: the sequence's length, or the window where that is shorter. That attention looks
    at earlier tokens only is not taken off, so that numbers can be compared with those of others. Recomputed
    activations are no use and do not count. Under ``lora`` the model is frozen: ``4 N + 6 n``, with n values of
    adapters, as no gradients of the N are worked out.
    """
    tables = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    multiplied = parameter_count(model) - tables + model.vocab_size * model.dim
    products = 4 * multiplied + 6 * adapter_parameters(model, lora) if lora.rank else 6 * multiplied
    return float(products + 12 * model.n_heads * head_size(model) * seen_positions(model, seq_len))


def seen_positions(model: ModelConfig, seq_len: int, layers: range | None = None) -> int:
    """Summed over ``layers`` (all): the positions that a window leaves of ``seq_len``."""
    layers = range(model.n_layers) if layers is None else layers
    if model.window is None or model.window >= seq_len:
        return len(layers) * seq_len
    full = sum(model.full_every > 0 and (layer + 1) % model.full_every == 0 for layer in layers)
    return full * seq_len + (len(layers) - full) * model.window
