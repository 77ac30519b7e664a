"""Batches of a run, read ahead by threads. Where each row comes from, :mod:`llm.data.order` says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.data.order import NOTHING, Order, Picks
from llm.data.source import Row, Source

LATENT = 8  # reads at a time of each thread that the config asks for, where each waits for a store's answer


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: ``tokens`` int64 (R, T + 1); ``counted`` bool (R, T), the targets that count (None: all);
    ``documents`` int32 (R, T), numbers of the documents of each row, which do not see each other (None: one each)."""

    tokens: Tensor
    counted: Tensor | None = None
    documents: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def split(self, size: int) -> list[Rows]:
        """Micro-batches of ``size`` rows; the last one may have fewer."""
        return [self[at : at + size] for at in range(0, len(self), size)]

    def __getitem__(self, rows: slice) -> Rows:
        rest = (None if each is None else each[rows] for each in (self.counted, self.documents))
        return Rows(self.tokens[rows], *rest)


@dataclass(frozen=True)
class Share:
    """The rows of each global batch that are this rank's, one of ``of`` that divide it evenly."""

    rank: int = 0
    of: int = 1

    def take(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Its part of the values of all rows."""
        rows = len(values) // self.of
        return values[self.rank * rows : (self.rank + 1) * rows]


class Reader:
    """Reads rows of several sources, ``threads`` at a time; with none, when they are asked for.

    ``masked``: documents in a row do not see each other.
    """

    def __init__(self, sources: list[Source], seq_len: int, threads: int, ahead: int, masked: bool = True) -> None:
        self.sources, self.seq_len, self.ahead = sources, seq_len, ahead
        self.masked = masked and any(source.has_documents for source in sources)
        self._near = ThreadPoolExecutor(threads, "data") if threads else None
        self._far = ThreadPoolExecutor(threads * LATENT, "data") if threads else None
        self._nothing = Row(np.zeros(seq_len + 1, np.uint8), None, np.zeros(seq_len, bool))

    def batches(self, order: Order, picks: Iterable[Picks], share: Share) -> Iterator[tuple[Picks, Rows]]:
        """This rank's rows of each of ``picks``, in order. Raises what a source does."""
        waiting: deque[tuple[Picks, Callable[[], list[Row]]]] = deque()
        coming = iter(picks)
        while True:
            while len(waiting) < 1 + (self.ahead if self._near else 0):
                following = next(coming, None)
                if following is None:
                    break
                waiting.append((following, self._begin(order, following, share)))
            if not waiting:
                return
            picked, rows = waiting.popleft()
            yield picked, self._stacked(rows())

    def held_out(self, source: Source, rows: int, batches: int, share: Share) -> Iterator[Rows]:
        """This rank's rows of the first ``batches`` batches of ``source``, in order, ``rows`` in all ranks' together.

        Every rank gets equally many: rows that fill the last batch up do not count.
        """
        for batch in range(min(batches, -(-source.size // rows))):
            first, last = batch * rows, min((batch + 1) * rows, source.size)
            whole = -(-(last - first) // share.of) * share.of
            wanted = np.arange(first, first + whole)
            wanted[last - first :] = NOTHING
            indices = share.take(wanted).tolist()
            # From a store these are requests, which go out together.
            read = map if self._far is None or source.near else self._far.map
            yield self._stacked(
                list(read(lambda each: self._nothing if each == NOTHING else source.row(each), indices))
            )

    def close(self) -> None:
        """Read no more; what is being read is not waited for."""
        for pool in (self._near, self._far):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, order: Order, picks: Picks, share: Share) -> Callable[[], list[Row]]:
        """Begin to read; returns what waits for it."""
        sources, ordinals = share.take(picks.sources), share.take(picks.ordinals)
        if self._near is None or self._far is None:
            return lambda: self._read(order, sources, ordinals)
        # From a store each row is a request: they go out together. From a disk a row takes less than a hand-over.
        near = all(source.near for source in self.sources)
        pool, step = (self._near, max(1, len(sources))) if near else (self._far, 1)
        parts: list[Future[list[Row]]] = [
            pool.submit(self._read, order, sources[at : at + step], ordinals[at : at + step])
            for at in range(0, len(sources), step)
        ]
        return lambda: [row for part in parts for row in part.result()]

    def _read(self, order: Order, sources: NDArray[np.int64], ordinals: NDArray[np.int64]) -> list[Row]:
        found = [self._nothing] * len(sources)
        for number, source in enumerate(self.sources):
            own = np.flatnonzero((sources == number) & (ordinals != NOTHING))
            if own.size:
                for place, index in zip(own.tolist(), order.indices(number, ordinals[own]).tolist(), strict=True):
                    found[place] = source.row(index)
        return found

    def _stacked(self, rows: list[Row]) -> Rows:
        tokens = np.empty((len(rows), self.seq_len + 1), np.int64)
        counted = documents = None
        if any(row.counted is not None for row in rows):
            counted = np.ones((len(rows), self.seq_len), bool)
        if self.masked:
            documents = np.zeros((len(rows), self.seq_len), np.int32)
        for number, row in enumerate(rows):
            tokens[number] = row.tokens
            if counted is not None and row.counted is not None:
                counted[number] = row.counted
            if documents is not None and row.starts is not None:
                documents[number] = row.starts[:-1]
        rest = [None if each is None else torch.from_numpy(each) for each in (counted, documents)]
        if rest[1] is not None:
            torch.cumsum(rest[1], 1, out=rest[1])  # four times as fast as NumPy's
        return Rows(torch.from_numpy(tokens), *rest)
