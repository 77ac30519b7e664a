"""A static cache: keys and values of a batch whose rows are generated together.

Rows end at the same column, so those with shorter prompts are padded on the left. Then every step writes one column of
all rows, and reads one slice of what is there: without padding, attention in it needs no mask at all.

Shapes: B rows, T new columns, C columns there are, S of them read, K key/value heads, H query heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.utils.config import ModelConfig, head_size


@dataclass
class StaticCache:
    """Keys and values of all layers, each (B, K, C, E), as one forward of ``columns`` (T) more sees them.

    ``read`` says how many columns attention reads: those filled after this forward, or all C where shapes may not
    change from step to step, as in CUDA graphs; what is not filled is masked then. ``padding`` (B): columns at the
    left of each row that hold nothing; None where there are none.
    """

    keys: list[Tensor]
    values: list[Tensor]
    columns: Tensor
    read: int
    padding: Tensor | None = None
    first: bool = False  # nothing was there before: this is the prompt
    masked: bool = False  # more is read than is filled
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def layer(self, number: int, window: int | None) -> StaticKeys:
        """Keys and values of one layer."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return StaticKeys(self, self.keys[number], self.values[number], self._masks[window])

    def _mask(self, window: int | None) -> Tensor | None:
        """Which of the S columns the T new ones see, bool (B or 1, 1, T, S); None for all before them and themselves.

        Padding sees itself: a row of the softmax without any column would be no number.
        """
        window = None if window is None or window >= self.read else window
        plain = window is None and self.padding is None and not self.masked
        if plain and (self.first or self.columns.shape[0] == 1):
            return None
        there = torch.arange(self.read, device=self.columns.device)
        distance = self.columns[:, None] - there  # (T, S)
        allowed = distance >= 0
        if window is not None:
            allowed = allowed & (distance < window)
        allowed = allowed[None, None]
        if self.padding is not None:
            padding = self.padding[:, None, None, None]
            allowed = allowed & ((there >= padding) | (self.columns[:, None] < padding))
        return allowed


@dataclass(frozen=True)
class StaticKeys:
    """One layer of a static cache."""

    cache: StaticCache
    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Write T columns, then attention of their queries (B, H, T, E): (B, H, T, E)."""
        self.keys.index_copy_(2, self.cache.columns, k)
        self.values.index_copy_(2, self.cache.columns, v)
        # A prompt's own keys are all there is, and lie better in memory.
        whole = self.cache.first and k.shape[2] == self.cache.read
        k = k if whole else self.keys[:, :, : self.cache.read]
        v = v if whole else self.values[:, :, : self.cache.read]
        causal = self.mask is None and q.shape[2] > 1
        if q.shape[1] != k.shape[1] and q.shape[2] == 1:
            # Queries that share keys stand in as positions, which needs no copy of the keys.
            groups = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H / K, E)
            out = F.scaled_dot_product_attention(groups, k, v, attn_mask=self.mask, scale=scale)
            return out.view(q.shape)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def empty_columns(
    config: ModelConfig, rows: int, columns: int, dtype: torch.dtype, device: torch.device, parts: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Room for keys and values of every layer, on one of ``parts`` ranks that share the heads.

    Zeros, not whatever is in memory: columns that are masked are still multiplied, by 0, and NaN would stay NaN.
    """
    shape = (rows, config.n_kv_heads // parts, columns, head_size(config))
    keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
    values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
    return keys, values
