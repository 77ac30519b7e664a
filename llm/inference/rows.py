"""Rows of tokens that a model goes on with: those that keep what was computed, and those that cannot.

Shapes: B rows, T columns of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llm.inference.cache import StaticCache, empty_columns
from llm.model.transformer import Transformer

ROOM = 64  # columns are reserved in multiples of this, so that compiled code sees few sizes


class Rows(Protocol):
    """A batch whose rows get one token each at a time. All ranks of a model that is spread call it alike."""

    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """Logits (B, V) of what follows each prompt; at most ``new_tokens`` will be added to each."""

    def add(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each row: logits (B, V) of what follows it."""


class CachedRows:
    """With a static cache of keys and values: a token costs one position.

    ``compiled`` makes one program of a whole step, in which kernels are fused; worth its seconds from some hundred
    tokens on. ``parts`` ranks share the heads under tensor parallelism.
    """

    def __init__(self, model: Transformer, compiled: bool = False, parts: int = 1) -> None:
        self.model = model
        weight = next(model.parameters())
        self.dtype, self.device, self.parts = weight.dtype, weight.device, parts
        self.still = compiled and self.device.type == "cuda"  # CUDA graphs: every step reads as much as the last one
        self._step: Callable[..., Tensor] = _forward
        if self.still:
            self._step = torch.compile(_forward, mode="reduce-overhead", dynamic=False)
        elif compiled:
            self._step = torch.compile(_forward, dynamic=True)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """As :class:`Rows`."""
        width = max(map(len, prompts))
        room = -(-(width + new_tokens) // ROOM) * ROOM
        self.keys, self.values = empty_columns(
            self.model.config, len(prompts), room, self.dtype, self.device, self.parts
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.padding = None if int(lengths.min()) == width else width - lengths
        self.length = 0
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        last = torch.arange(1, len(prompts) + 1, device=self.device) * width - 1
        return self.extend(torch.tensor(padded, device=self.device), last)

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> Tensor:
        """As :class:`Rows`."""
        return self.extend(torch.tensor(tokens, device=self.device)[:, None])

    @torch.no_grad()
    def extend(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Put columns of tokens (B, T) into the cache: logits (N, V) at the places ``wanted``, or at all (B x T, V)."""
        first, self.length = self.length, self.length + tokens.shape[1]
        columns = torch.arange(first, self.length, device=self.device)
        read = self.keys[0].shape[2] if self.still and first else self.length
        if wanted is None:
            wanted = torch.arange(tokens.numel(), device=self.device)
        step = self._step if first else _forward  # prompts come in all sizes: what they need is not compiled
        places = (columns, read, self.keys, self.values, self.padding, wanted)
        return step(self.model, tokens, *places, first=first == 0, masked=read > self.length)

    def forget(self, columns: int) -> None:
        """Take the last columns back."""
        self.length -= columns


class RecomputedRows:
    """Without a cache, for a model that is spread as it is for training: every token costs the whole row.

    ``logits_of`` takes tokens (B, T) and gives logits (B, T, V). Of rows longer than ``limit`` the end is seen.
    """

    def __init__(self, logits_of: Callable[[Tensor], Tensor], limit: int, device: torch.device) -> None:
        self.logits_of, self.limit, self.device = logits_of, limit, device

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
        """As :class:`Rows`."""
        self.rows = [list(prompt) for prompt in prompts]
        return self._last()

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> Tensor:
        """As :class:`Rows`."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return self._last()

    def _last(self) -> Tensor:
        """Rows are padded on the right: causal attention never looks there."""
        seen = [row[-self.limit :] for row in self.rows]
        width = max(map(len, seen))
        rows = torch.tensor([row + [0] * (width - len(row)) for row in seen], device=self.device)
        last = torch.tensor([len(row) - 1 for row in seen], device=self.device)
        return self.logits_of(rows)[torch.arange(len(seen), device=self.device), last]


def _forward(
    model: Transformer,
    tokens: Tensor,
    columns: Tensor,
    read: int,
    keys: list[Tensor],
    values: list[Tensor],
    padding: Tensor | None,
    wanted: Tensor,
    first: bool,
    masked: bool,
) -> Tensor:
    """Logits (N, V) of tokens (B, T) that go into these ``columns`` (T) of the cache. All state comes from outside,
    so that this is one program to the compiler."""
    positions = columns if padding is None else (columns - padding[:, None]).clamp(min=0)  # (T) or (B, T)
    cache = StaticCache(keys, values, columns, read, padding, first, masked)
    return model(tokens, positions=positions, cache=cache, wanted=wanted)  # type: ignore[no-any-return]
