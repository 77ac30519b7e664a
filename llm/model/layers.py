"""Parts of the decoder. Shapes: B rows, T positions, D width, H query heads, K key/value heads, E head size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.utils.config import ModelConfig, head_size


def rotary_table(
    config: ModelConfig, length: int, device: torch.device, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, E/2) in float32, or (B, T, E/2) for ``positions`` (B, T).

    Recomputed in every forward instead of kept in a buffer: it costs next to nothing, and a buffer would need care
    wherever a model is built on the meta device, sharded or saved.
    """
    size = head_size(config)
    frequencies = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)  # (E/2)
    if positions is None:
        positions = torch.arange(length, device=device)
    angles = positions.float().unsqueeze(-1) * frequencies  # (T, E/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of a head by its position's angle. ``x`` is (B, heads, T, E)."""
    first, second = x.float().chunk(2, dim=-1)  # (B, heads, T, E/2) each; float32 keeps long positions exact under bf16
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


class Linear(nn.Linear):
    """A matrix (out, in) without bias, left unfilled: values come from ``llm.model.init`` or a checkpoint.

    What torch would draw here is thrown away, and on the meta device the drawing alone imports the compiler.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class Embedding(nn.Embedding):
    """A row of width D for each token; unfilled, for the same reasons."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class RMSNorm(nn.Module):
    """Scale every position to unit root mean square, times a learned weight (D)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions; H/K query heads share one key/value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = head_size(config)
        self.wq = Linear(config.dim, self.n_heads * self.head_dim)
        self.wk = Linear(config.dim, self.n_kv_heads * self.head_dim)
        self.wv = Linear(config.dim, self.n_kv_heads * self.head_dim)
        self.wo = Linear(self.n_heads * self.head_dim, config.dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], documents: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        # Under tensor parallelism a rank has only some of the heads: -1.
        q = self.wq(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.wk(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_heads != self.n_heads)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: a gate of width F decides what of ``up`` passes to ``down``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim)
        self.up = Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and feed-forward, each after a norm and added to the stream. The unit that FSDP shards."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # its number, from 0
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], documents: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, documents)  # (B, T, D)
        return x + self.ffn(self.ffn_norm(x))  # type: ignore[no-any-return]
