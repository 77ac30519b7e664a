"""Whole documents in rows of one length, planned when a dataset is prepared: the position in it stays one integer.

Best-fit decreasing (Johnson, 1973; for language models Ding et al., "Fewer Truncations Improve Language Modeling",
2024): the longest documents first, each into the row in which it leaves the least space. What is longer than a row is
cut into pieces that share one token, so that every token but a document's first is learnt exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packed:
    """Rows end to end: ``tokens``, ``starts`` (of pieces, and of what fills a row up) and ``loss``, rows x row each."""

    tokens: NDArray[Any]
    starts: NDArray[np.bool_]
    loss: NDArray[np.bool_]
    rows: int
    used: int  # tokens that are no filling
    cut: int  # documents that did not fit into a row


def pack(tokens: NDArray[Any], starts: NDArray[np.bool_], loss: NDArray[np.bool_] | None, row: int) -> Packed:
    """Pack documents that lie end to end in ``tokens`` (N) into rows of ``row`` tokens.

    ``starts`` (N) is true where a document begins, the first token among them; ``loss`` (N) where a token is to be
    learnt, None for everywhere. The first token of a piece is never learnt: nothing in its row comes before it.
    """
    if not len(tokens):
        return Packed(tokens, starts, starts, 0, 0, 0)
    begins, lengths, cut = _pieces(np.flatnonzero(starts), len(tokens), row)
    rows, offsets, count = best_fit(lengths, row)
    places = rows * row + offsets
    order = np.argsort(places)
    first, last = begins[order].tolist(), (begins + lengths)[order].tolist()
    filled = np.bincount(rows, lengths, count).astype(np.int64)
    short = np.flatnonzero(filled < row)
    holes = short * row + filled[short]  # where filling begins
    after = np.cumsum(np.bincount(rows, minlength=count))[short].tolist()  # so many pieces
    sizes = (row - filled[short]).tolist()
    packed = _joined(tokens, first, last, after, sizes)
    if loss is None:
        new_loss = np.ones(count * row, bool)
        for begin, size in zip(holes.tolist(), sizes, strict=True):
            new_loss[begin : begin + size] = False
    else:
        new_loss = _joined(loss, first, last, after, sizes)
    new_loss[places] = False
    new_starts = np.zeros(count * row, bool)
    new_starts[places] = new_starts[holes] = True
    return Packed(packed, new_starts, new_loss, count, int(lengths.sum()), cut)


def _joined(
    values: NDArray[Any], first: list[int], last: list[int], after: list[int], sizes: list[int]
) -> NDArray[Any]:
    """The pieces ``first`` to ``last`` of ``values`` end to end; ``sizes`` zeros ``after`` so many of them."""
    parts = [values[begin:end] for begin, end in zip(first, last, strict=True)]
    zeros = np.zeros(max(sizes, default=0), values.dtype)
    for index, size in zip(reversed(after), reversed(sizes), strict=True):
        parts.insert(index, zeros[:size])
    return np.concatenate(parts)


def best_fit(lengths: NDArray[np.int64], row: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """For pieces of these ``lengths`` (P), none above ``row``: the row (P) and the offset in it (P); and how many rows.

    Rows are numbered as they are opened. Pieces of one length go into rows in their own order.
    """
    places, offsets = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    free: dict[int, list[int]] = {}  # space left -> rows that have it
    spaces = 0  # bit s is set where there are rows with space s
    count = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            rows = free[space]
            place = rows.pop()
            if not rows:
                spaces ^= 1 << space
        else:
            place, space, count = count, row, count + 1
        places[piece], offsets[piece] = place, row - space
        left = space - length
        if left:
            free.setdefault(left, []).append(place)
            spaces |= 1 << left
    return places, offsets, count


def _pieces(begins: NDArray[np.int64], total: int, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Where pieces of at most ``row`` tokens begin, and their lengths; and how many documents were cut."""
    lengths = np.diff(np.append(begins, total))
    step = row - 1  # two pieces of one document share a token
    counts = np.maximum(-(-(lengths - 1) // step), 1)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + number * step
    left = np.repeat(lengths, counts) - number * step
    return starts, np.minimum(left, row), int(np.count_nonzero(counts > 1))
