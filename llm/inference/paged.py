"""A paged cache (Kwon et al., "PagedAttention", 2023): keys and values in blocks of positions that requests take as
they grow and give back when they leave, and that requests with the same beginning share.

Shapes: N tokens of all requests laid end to end, P positions of a block, K key/value heads, H query heads, E head size.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.utils.config import ModelConfig, head_size

BLOCK = 16  # positions of a block
_Name = tuple[int, tuple[int, ...]]  # of what a block holds: the serial number of what is before it, and its tokens


class Blocks:
    """Which blocks are taken, and by how many. Block 0 is nobody's: it stands where rows of a batch have no block.

    What a full block holds has a name, so that another request that begins alike takes the block as it is. Blocks
    that nobody uses are free, named ones too: those are forgotten last, the longest unused first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._unused = list(range(count, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, and still named
        self._users = [0] * (count + 1)
        self._found: dict[_Name, int] = {}
        self._names: dict[int, tuple[int, _Name]] = {}  # by block: its serial number, and its name
        self._serials = itertools.count(1)

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._unused) + len(self._kept)

    def take(self) -> int | None:
        """A block to fill; None where all are in use."""
        if self._unused:
            block = self._unused.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._found[self._names.pop(block)[1]]
        else:
            return None
        self._users[block] = 1
        return block

    def give(self, blocks: Sequence[int]) -> None:
        """One user less of each, the last first: of a text's blocks the first are worth the most."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._names:
                self._kept[block] = None
            else:
                self._unused.append(block)

    def shared(self, tokens: Sequence[int]) -> list[int]:
        """Blocks that hold how ``tokens`` begin, with one user more. The last token is never among them: what follows
        it is still to be computed."""
        found: list[int] = []
        before = 0
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            block = self._found.get((before, tuple(tokens[start : start + BLOCK])))
            if block is None:
                break
            before = self._names[block][0]
            self._users[block] += 1
            self._kept.pop(block, None)
            found.append(block)
        return found

    def name(self, blocks: Sequence[int], number: int, tokens: Sequence[int]) -> None:
        """The block ``number`` of a request's holds these P tokens. Nothing is said where one before it has no name,
        or where another block has this one."""
        before = self._names.get(blocks[number - 1]) if number else (0, (0, ()))
        if before is None or blocks[number] in self._names:
            return
        name = (before[0], tuple(tokens))
        if name not in self._found:
            self._found[name] = blocks[number]
            self._names[blocks[number]] = next(self._serials), name


class Pool:
    """Keys and values of all layers, each (1 + blocks, P, K, E)."""

    def __init__(self, config: ModelConfig, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (blocks + 1, BLOCK, config.n_kv_heads, head_size(config))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.device = device

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeros: what is masked is still multiplied, by 0, and another request's NaN would stay NaN."""
        if blocks:
            at = torch.tensor(blocks, device=self.device)
            for each in (*self.keys, *self.values):
                each.index_fill_(0, at, 0)


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a block takes in all layers."""
    return 2 * config.n_layers * BLOCK * config.n_kv_heads * head_size(config) * dtype.itemsize


@dataclass(frozen=True)
class Span:
    """Tokens of one request in a forward: ``count`` from position ``first`` on, whose keys go into ``blocks``."""

    blocks: Sequence[int]
    first: int
    count: int


@dataclass(frozen=True)
class _Group:
    """Requests with one token each, and about as many blocks: one call of attention."""

    at: Tensor  # (R), among the N tokens
    table: Tensor  # (R, most blocks), 0 where a row has less
    last: Tensor  # (R, 1), the positions of the tokens


@dataclass
class PagedCache:
    """The cache as one forward of N tokens, (1, N), sees it: those of ``spans``, laid end to end."""

    pool: Pool
    spans: Sequence[Span]
    groups: list[_Group] = field(init=False)
    _chunks: list[tuple[int, Span, Tensor]] = field(init=False)  # where it begins, and its blocks
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.pool.device
        places: list[int] = []
        sizes: dict[int, list[tuple[int, Span]]] = {}
        self._chunks, start = [], 0
        for span in self.spans:
            positions = range(span.first, span.first + span.count)
            places += [span.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in positions]
            used = span.blocks[: -(-(span.first + span.count) // BLOCK)]
            if span.count == 1:
                sizes.setdefault((len(used) - 1).bit_length(), []).append((start, span))
            else:
                self._chunks.append((start, span, torch.tensor(used, device=device)))
            start += span.count
        self.places = torch.tensor(places, device=device)  # (N), among all positions of the pool
        self.groups = [self._group(spans) for spans in sizes.values()]

    def _group(self, spans: list[tuple[int, Span]]) -> _Group:
        rows = [list(span.blocks[: span.first // BLOCK + 1]) for _, span in spans]
        most = max(map(len, rows))
        device = self.pool.device
        return _Group(
            torch.tensor([start for start, _ in spans], device=device),
            torch.tensor([row + [0] * (most - len(row)) for row in rows], device=device),
            torch.tensor([span.first for _, span in spans], device=device)[:, None],
        )

    @property
    def positions(self) -> Tensor:
        """Of the N tokens, each in its own request: (1, N)."""
        found = [torch.arange(span.first, span.first + span.count) for span in self.spans]
        return torch.cat(found)[None].to(self.pool.device)

    def layer(self, number: int, window: int | None) -> PagedKeys:
        """Keys and values of one layer."""
        for at, group in enumerate(self.groups):
            if (at, window) not in self._masks:
                there = torch.arange(group.table.shape[1] * BLOCK, device=self.pool.device)
                self._masks[at, window] = _seen(group.last, there, window)[:, None, None]  # (R, 1, 1, S)
        for at, (_, span, _) in enumerate(self._chunks, len(self.groups)):
            if (at, window) not in self._masks:
                self._masks[at, window] = self._chunk_mask(span, window)
        return PagedKeys(self, number, window)

    def _chunk_mask(self, span: Span, window: int | None) -> Tensor | None:
        """(T, S); None where it is the causal one of a prompt's beginning."""
        end = span.first + span.count
        if span.first == 0 and (window is None or window >= end):
            return None
        there = torch.arange(end, device=self.pool.device)
        return _seen(there[span.first :, None], there, window)

    def attend(self, q: Tensor, number: int, window: int | None, scale: float | None) -> Tensor:
        """Attention of the queries (H, N, E) to what the layer ``number`` holds: (H, N, E)."""
        H, _, E = q.shape
        keys, values = self.pool.keys[number], self.pool.values[number]
        K = keys.shape[2]
        out = torch.empty_like(q)
        for at, group in enumerate(self.groups):
            R, S = group.table.shape[0], group.table.shape[1] * BLOCK
            k = keys[group.table].view(R, S, K, E).transpose(1, 2)  # (R, K, S, E)
            v = values[group.table].view(R, S, K, E).transpose(1, 2)
            # Queries that share keys stand in as positions, which needs no copy of the keys.
            rows = q[:, group.at].transpose(0, 1).reshape(R, K, H // K, E)
            mask = self._masks[at, window]
            done = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
            out[:, group.at] = done.reshape(R, H, E).transpose(0, 1)
        for at, (start, span, table) in enumerate(self._chunks, len(self.groups)):
            end = span.first + span.count
            k = keys[table].view(-1, K, E)[:end].transpose(0, 1)[None]  # (1, K, S, E)
            v = values[table].view(-1, K, E)[:end].transpose(0, 1)[None]
            mask = self._masks[at, window]
            mine = slice(start, start + span.count)
            out[:, mine] = F.scaled_dot_product_attention(
                q[None, :, mine], k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=H != K
            )[0]
        return out


@dataclass(frozen=True)
class PagedKeys:
    """One layer of a paged cache."""

    cache: PagedCache
    number: int
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Write the keys and values (1, K, N, E), then attention of the queries (1, H, N, E): (1, H, N, E)."""
        pool = self.cache.pool
        pool.keys[self.number].flatten(0, 1).index_copy_(0, self.cache.places, k[0].transpose(0, 1))
        pool.values[self.number].flatten(0, 1).index_copy_(0, self.cache.places, v[0].transpose(0, 1))
        return self.cache.attend(q[0], self.number, self.window, scale)[None]


def _seen(queries: Tensor, there: Tensor, window: int | None) -> Tensor:
    """Which of the positions ``there`` (S) these queries (R, 1) see, bool (R, S)."""
    distance = queries - there
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
