"""Parts of the decoder. Shapes: B rows, T positions, D width, H query heads, K key/value heads, E head size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.attention import Keys, Mask, attend
from llm.model.rope import rotate
from llm.utils.config import ModelConfig, head_size

MUP_HEAD = 64  # values of a head at which muP's scale of attention is the usual one


class Linear(nn.Linear):
    """A matrix (out, in), left unfilled: values come from ``llm.model.init`` or a checkpoint.

    What torch would draw here is thrown away, and on the meta device the drawing alone imports the compiler.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        """Leave the values as they are."""


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


def attention_scale(config: ModelConfig) -> float | None:
    """What products of queries and keys are multiplied by; None = 1 / sqrt(E).

    muP divides by E (Yang et al., "Tensor Programs V", 2022, section 4.1), here such that heads of 64 change nothing.
    """
    return MUP_HEAD**0.5 / head_size(config) if config.init == "mup" else None


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """How many positions each one sees in ``layer`` (from 0), itself included; None = all."""
    full = config.full_every > 0 and (layer + 1) % config.full_every == 0
    return None if full else config.window


class Attention(nn.Module):
    """Causal attention with rotary positions; H/K query heads share one key/value head.

    ``gather``, set from outside where positions are spread over ranks, turns this rank's keys or values (B, K, T, E)
    into those of the whole row, in order.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = head_size(config)
        self.scale = attention_scale(config)
        self.gather: Callable[[Tensor], Tensor] | None = None
        queries, keys = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.wq = Linear(config.dim, queries, config.qkv_bias)
        self.wk = Linear(config.dim, keys, config.qkv_bias)
        self.wv = Linear(config.dim, keys, config.qkv_bias)
        self.wo = Linear(queries, config.dim, config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask | Keys) -> Tensor:
        B, T, _ = x.shape
        # Under tensor parallelism a rank has only some of the heads: -1.
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # Under autocast norms give float32, and kernels want one type.
        q, k = (rotate(each, *rope).transpose(1, 2).to(v.dtype) for each in (q, k))
        if self.gather is not None:
            k, v = self.gather(k), self.gather(v)  # (B, K, S, E)
        out = attend(q, k, v, mask, self.scale) if isinstance(mask, Mask) else mask.attend(q, k, v, self.scale)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): a gate of width F decides what of ``up`` passes to ``down``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim, config.ffn_bias)
        self.up = Linear(config.dim, config.ffn_dim, config.ffn_bias)
        self.down = Linear(config.ffn_dim, config.dim, config.ffn_bias)

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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask | Keys) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask)  # (B, T, D)
        return x + self.ffn(self.ffn_norm(x))  # type: ignore[no-any-return]
