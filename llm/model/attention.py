"""Scaled dot-product attention under the masks of a decoder, by the fastest kernel that can do them.

Shapes: B rows, T positions of queries, S of keys (S = T unless context parallelism gathered them), H query heads, K
key/value heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH_TYPES = (torch.float16, torch.bfloat16)  # all that the kernel for packed documents takes
FLASH_CAPABILITY = (8, 0)  # Ampere
FLASH_HEAD = 256  # values of a head, at most


@dataclass(frozen=True)
class Mask:
    """Which keys the queries of a layer see: those at and before their own position, and of these

    - ``allowed``, bool (B or 1, 1, T, S): where it is true. It is complete: it has the causal part, too;
    - ``bounds``, int32 (N + 1): those of the same document, as offsets into all rows laid end to end, from 0 to B x T;
      the same offset again stands for an empty one. With ``window``, only so many, the query's own included;
    - neither: all.
    """

    allowed: Tensor | None = None
    bounds: Tensor | None = None
    window: int | None = None


class Keys(Protocol):
    """Where the keys and values of one layer are kept from one forward to the next (``llm.inference``)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Keep the keys and values (B, K, T, E) of new positions; attention of their queries (B, H, T, E) to them and
        to all before them. As :func:`attend`."""


class Cache(Protocol):
    """Keys and values of all layers of a model."""

    def layer(self, number: int, window: int | None) -> Keys:
        """Those of one layer, numbered from 0, whose positions see ``window`` positions (None: all)."""


def make_mask(
    rows: int,
    length: int,
    device: torch.device,
    window: int | None = None,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    packed: bool = False,
) -> Mask:
    """The mask of layers with this ``window`` (None: without one), for ``rows`` rows of ``length`` positions.

    Queries are at ``positions`` (T), None for all of them in order; ``documents`` (B, ``length``) number the documents
    of the rows, each of one run of positions. ``packed``: the kernel for packed documents may be used, see
    :func:`packs`.
    """
    if window is not None and window >= length:
        window = None
    if documents is None and window is None and positions is None:
        return Mask()
    if packed and positions is None:
        return Mask(bounds=document_bounds(rows, length, device, documents), window=window)
    keys = torch.arange(length, device=device)
    queries = keys if positions is None else positions
    distance = queries[:, None] - keys  # (T, S)
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None, None]
    if documents is not None:
        documents = documents.to(device)
        own = documents if positions is None else documents[:, positions]
        allowed = allowed & (own[:, None, :, None] == documents[:, None, None, :])
    return Mask(allowed=allowed)


def packs(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Can heads of ``head`` values in ``dtype`` go through the kernel for packed documents?"""
    return (
        device.type == "cuda"
        and dtype in FLASH_TYPES
        and head <= FLASH_HEAD
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    )


def document_bounds(rows: int, length: int, device: torch.device, documents: Tensor | None) -> Tensor:
    """Offsets of the documents of (B, T) in all rows laid end to end, int32, with B x T at the end; on ``device``.

    A row ends a document. The last offset is repeated up to a power of two, so that compiled code sees few shapes.
    Documents on the CPU are best: how many there are is needed there, and nothing has to wait for the device.
    """
    total = rows * length
    if documents is None:
        return torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    offsets = starts.flatten().nonzero().flatten()
    size = 1 << (offsets.numel() - 1).bit_length()
    bounds = torch.full((size + 1,), total, dtype=torch.int32, device=documents.device)
    bounds[: offsets.numel()] = offsets
    return bounds.to(device, non_blocking=True)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """Attention of queries (B, H, T, E) to keys and values (B, K, S, E): (B, H, T, E), laid out by position.

    ``scale`` multiplies the products, None = 1 / sqrt(E). Raises ValueError for gathered keys without a mask.
    """
    if mask.bounds is not None:
        return _attend_packed(q, k, v, mask.bounds, mask.window, scale)
    causal = mask.allowed is None
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: set Transformer.parts to the number of ranks that share a row"
        )
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and not (causal and q.dtype in FLASH_TYPES):
        # Only the flash kernel shares keys there; others fall back to one that holds all scores.
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.allowed, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None, scale: float | None) -> Tensor:
    """The same, for documents that lie end to end: each is a sequence of its own to the kernel."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, E = q.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q, k, v))  # (B x T, heads, E)
    seen = (-1 if window is None else window - 1, 0)  # keys before and after the query
    grouped = k.shape[1] != H
    out = varlen_attn(q, k, v, bounds, bounds, T, T, scale=scale, window_size=seen, enable_gqa=grouped)
    return out.view(B, T, H, E).transpose(1, 2)  # type: ignore[union-attr]
