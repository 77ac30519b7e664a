"""The decoder: tokens in, logits or a loss out. Parallelism and precision come from outside (``llm.train.dist``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm.model.attention import Cache, Mask, make_mask, packs
from llm.model.layers import Block, Embedding, Linear, RMSNorm, layer_window
from llm.model.loss import linear_cross_entropy
from llm.model.rope import rotary_table
from llm.utils.config import ModelConfig, head_size


class Transformer(nn.Module):
    """Llama-style decoder. Build it on the meta device, then fill it by ``init_weights`` or from a checkpoint.

    A stage of a pipeline has only some ``layers``, under their own numbers, the first one also the embedding and the
    last one the head. ``parts``, set from outside together with ``Attention.gather``, is the number of ranks over
    which the positions of a row are spread. Shapes: B rows, T positions, D width, V vocabulary.
    """

    def __init__(self, config: ModelConfig, layers: range | None = None) -> None:
        super().__init__()
        self.config = config
        self.parts = 1
        layers = range(config.n_layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.n_layers
        if self.first or (self.last and config.tie_embeddings):  # a last stage has it for its head
            self.embedding = Embedding(config.vocab_size, config.dim)
        self.windows = {str(layer): layer_window(config, layer) for layer in layers}
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in layers})
        if self.last:
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.head = Head(config)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one (V, D) if the config says so. ``to_empty`` parts them: call it again then.

        What a pipeline has on its first and its last stage is kept equal from outside.
        """
        if self.config.tie_embeddings and self.last:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """From tokens (B, T), on the first stage, or the stage before's output (B, T, D).

        ``positions`` (T) are the places of these columns in their row, 0 .. T - 1 unless given. ``documents`` (B, S)
        number the documents of packed rows, which do not see each other; they are those of the whole row, S = T x
        ``parts`` long, and may lie on the CPU. Returns what the next stage takes; on the last stage logits (B, T, V),
        or with ``targets`` (B, T; -100 = not counted) their losses, as :class:`Head`.

        With a ``cache`` the tokens follow those that went through it before; ``positions`` (T) or (B, T) are needed
        then. ``wanted`` (N) are the places, in all rows laid end to end, whose logits alone (N, V) are returned.
        """
        if self.first and positions is None and x.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{x.shape[1]} positions, but model.max_seq_len={self.config.max_seq_len}")
        length = x.shape[1] if positions is None else positions.shape[-1]  # tensor parallelism may split x between them
        rope = rotary_table(self.config, length, x.device, positions)  # cosines and sines
        if self.first:
            x = self.embedding(x)  # (B, T, D)
        masks = self._masks(x, length, positions, documents) if cache is None else {}
        for layer, block in self.blocks.items():
            window = self.windows[layer]
            x = block(x, rope, masks[window] if cache is None else cache.layer(int(layer), window))
        if self.last:
            if wanted is not None:
                x = x.flatten(0, 1)[wanted]  # (N, D)
            x = self.norm(x)
            if (scale := logit_scale(self.config)) != 1.0:
                x = x * scale
            x = self.head(x, targets)
        return x

    def _masks(
        self, x: Tensor, length: int, positions: Tensor | None, documents: Tensor | None
    ) -> dict[int | None, Mask]:
        """The mask of each kind of layer there is, by its window."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        packed = packs(x.device, dtype, head_size(self.config))
        spread = positions if self.parts > 1 else None  # those of a whole row are in order
        return {
            window: make_mask(x.shape[0], length * self.parts, x.device, window, spread, documents, packed)
            for window in set(self.windows.values())
        }


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


def logit_scale(config: ModelConfig) -> float:
    """What the last norm's output is multiplied by: 1, or under muP base width / width, which lets a matrix be tied."""
    return config.mup_base_dim / config.dim if config.init == "mup" else 1.0
