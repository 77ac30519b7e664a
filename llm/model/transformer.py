"""The decoder: tokens in, logits out. Parallelism and precision are applied from outside (``llm.train.dist``)."""

from __future__ import annotations

from torch import Tensor, nn

from llm.model.layers import Block, Embedding, Linear, RMSNorm, rotary_table
from llm.utils.config import ModelConfig


class Transformer(nn.Module):
    """Llama-style decoder. Build it on the meta device, then fill it by ``init_weights`` or from a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one (V, D) if the config says so. ``to_empty`` parts them: call it again then."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits (B, T, V) of ``tokens`` (B, T), T at most ``max_seq_len``."""
        positions = tokens.shape[1]
        if positions > self.config.max_seq_len:
            raise ValueError(f"{positions} positions, but model.max_seq_len={self.config.max_seq_len}")
        head_dim = self.config.dim // self.config.n_heads
        cos, sin = rotary_table(positions, head_dim, self.config.rope_theta, tokens.device)  # (T, E/2) each
        x = self.embedding(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def parameter_count(config: ModelConfig) -> int:
    """Number of trained values, from the shape alone."""
    head_dim = config.dim // config.n_heads
    attention = config.dim * head_dim * 2 * (config.n_heads + config.n_kv_heads)
    block = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return config.n_layers * block + embeddings + config.dim
