"""The decoder: tokens in, logits or a loss out. Parallelism and precision come from outside (``llm.train.dist``)."""

from __future__ import annotations

from torch import Tensor, nn

from llm.model.layers import Block, Embedding, Linear, RMSNorm, rotary_table
from llm.model.loss import linear_cross_entropy
from llm.utils.config import ModelConfig, head_size


class Transformer(nn.Module):
    """Llama-style decoder. Build it on the meta device, then fill it by ``init_weights`` or from a checkpoint.

    A stage of a pipeline has only some ``layers``, under their own numbers, the first one also the embedding and the
    last one the head. Shapes: B rows, T positions, D width, V vocabulary.
    """

    def __init__(self, config: ModelConfig, layers: range | None = None) -> None:
        super().__init__()
        self.config = config
        layers = range(config.n_layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.n_layers
        if self.first:
            self.embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in layers})
        if self.last:
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.head = Head(config)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one (V, D) if the config says so. ``to_empty`` parts them: call it again then.

        Where a pipeline has them on two stages they stay two, and are kept equal from outside.
        """
        if self.config.tie_embeddings and self.first and self.last:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """From tokens (B, T), on the first stage, or the stage before's output (B, T, D).

        ``positions`` (T) or (B, T) are those that rotary embeddings turn by, 0 .. T - 1 unless given; ``documents``
        (B, T) number the documents of packed rows, which do not see each other. Returns what the next stage takes; on
        the last stage logits (B, T, V), or with ``targets`` (B, T; -100 = not counted) their losses, as :class:`Head`.
        """
        if positions is None and x.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{x.shape[1]} positions, but model.max_seq_len={self.config.max_seq_len}")
        rope = rotary_table(self.config, x.shape[1], x.device, positions)  # cosines and sines
        if self.first:
            x = self.embedding(x)  # (B, T, D)
        for block in self.blocks.values():
            x = block(x, rope, documents)
        if self.last:
            x = self.head(self.norm(x), targets)
        return x


class Head(Linear):
    """The output matrix (V, D), and the loss that is worked out with it so that logits are never held at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.vocab_size)
        self.chunk, self.z_loss = 4096, 0.0  # positions at a time; weight of log(Z)^2. Set by the trainer.

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with ``targets`` (B, T) sums over all positions that count, float32 (2): what is trained
        on, which is cross-entropy + ``z_loss`` x log(Z)^2, and the cross-entropy alone, without gradient."""
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, self.chunk, self.z_loss)


def parameter_count(config: ModelConfig) -> int:
    """Number of trained values, from the shape alone."""
    size = head_size(config)
    attention = config.dim * size * 2 * (config.n_heads + config.n_kv_heads)
    block = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return config.n_layers * block + embeddings + config.dim
