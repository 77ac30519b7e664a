"""Arithmetic of boxes: an offset and a shape, in bytes along the last dimension.

Counting bytes and not values there makes every tensor an array of bytes: no type needs a case of its own, and a value
of no dimensions is a box of one.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Dims = tuple[int, ...]
FEW = 4  # boxes that are not worth sorting


class Box(NamedTuple):
    """``shape`` bytes that start at ``offset``."""

    offset: Dims
    shape: Dims

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape)


def of_bytes(offset: Sequence[int], shape: Sequence[int], itemsize: int) -> Box:
    """The box of values at ``offset``, as bytes."""
    if not shape:
        return Box((0,), (itemsize,))
    return Box((*offset[:-1], offset[-1] * itemsize), (*shape[:-1], shape[-1] * itemsize))


def overlap(a: Box, b: Box) -> Box | None:
    """Where two boxes meet, or None when they have nothing in common."""
    if a == b:
        return a if a.size else None
    offset, shape = [], []
    for x, n, y, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True):
        begin, end = (x if x > y else y), (x + n if x + n < y + m else y + m)
        if begin >= end:
            return None
        offset.append(begin)
        shape.append(end - begin)
    return Box(tuple(offset), tuple(shape))


def within(box: Box, origin: Dims) -> Box:
    """``box`` as seen from ``origin``."""
    if not any(origin):
        return box
    return Box(tuple(x - o for x, o in zip(box.offset, origin, strict=True)), box.shape)


class Index:
    """Finds which of many boxes meet a given one without a look at all of them.

    They are sorted along the dimension that tells most of them apart: the rows of row shards, the columns of column
    shards. A search looks at the boxes of that range alone.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        self.order: list[int] | None = None
        if len(boxes) <= FEW:
            return
        axes = range(len(boxes[0].shape))
        axis = self.axis = max(axes, key=lambda axis: len({box.offset[axis] for box in boxes}))
        self.order = sorted(range(len(boxes)), key=lambda each: boxes[each].offset[axis])
        self.begins = [boxes[each].offset[axis] for each in self.order]
        ends = [boxes[each].offset[axis] + boxes[each].shape[axis] for each in self.order]
        self.reach = list(itertools.accumulate(ends, max))  # how far the boxes up to here go

    def hits(self, box: Box) -> Iterator[tuple[int, Box]]:
        """(number of a box, where it meets ``box``)."""
        near: Iterable[int] = range(len(self.boxes))
        if self.order is not None:
            begin = box.offset[self.axis]
            first = bisect_right(self.reach, begin)
            near = self.order[first : bisect_left(self.begins, begin + box.shape[self.axis], first)]
        for each in near:
            if (common := overlap(self.boxes[each], box)) is not None:
                yield each, common

    def clash(self) -> tuple[int, int] | None:
        """Two of the boxes that meet."""
        if len(self.boxes) > 1:
            for number, box in enumerate(self.boxes):
                for other, _ in self.hits(box):
                    if other != number:
                        return number, other
        return None


def slabs(shape: Dims, first: int, last: int) -> Iterator[tuple[int, Box]]:
    """The bytes ``first`` .. ``last`` of a row-major array, cut into boxes that lie one after the other.

    Yields (where the box begins, box), at most two per dimension: what is left of a row, whole rows, a row's start.
    """
    if first == 0 and last == math.prod(shape):
        yield 0, Box((0,) * len(shape), shape)
        return
    if len(shape) == 1:
        if first < last:
            yield first, Box((first,), (last - first,))
        return
    inner = math.prod(shape[1:])
    if first >= last:
        return
    row, done = divmod(first, inner)
    if done:
        end = min(last - row * inner, inner)
        for at, box in slabs(shape[1:], done, end):
            yield row * inner + at, Box((row, *box.offset), (1, *box.shape))
        row += 1
    rows, rest = divmod(last, inner)
    if row < rows:
        yield row * inner, Box((row, *(0 for _ in shape[1:])), (rows - row, *shape[1:]))
    if rest and rows >= row:
        for at, box in slabs(shape[1:], 0, rest):
            yield rows * inner + at, Box((rows, *box.offset), (1, *box.shape))


def ranges(shape: Dims, box: Box, least: int) -> list[tuple[int, int]]:
    """The bytes (begin, end) of a row-major array that ``box`` needs.

    A box that consists of many runs shorter than ``least`` bytes gets one range around them all.
    """
    if box.shape == shape:
        return [(0, box.size)]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = len(shape) - 1  # the last dimension that the box cuts: what is inside of it is one run
    while axis and box.shape[axis] == shape[axis]:
        axis -= 1
    run = box.shape[axis] * strides[axis]
    begin = sum(o * s for o, s in zip(box.offset, strides, strict=True))
    if math.prod(box.shape[:axis]) == 1:
        return [(begin, begin + run)]
    if run < least:
        end = sum((o + n - 1) * s for o, n, s in zip(box.offset, box.shape, strides, strict=True)) + 1
        return [(begin, end)]
    outer = itertools.product(*(range(n) for n in box.shape[:axis]))
    starts = (begin + sum(i * s for i, s in zip(place, strides, strict=False)) for place in outer)
    return [(start, start + run) for start in starts]


def merge(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges sorted, without overlaps; those that touch become one."""
    if len(parts) == 1:
        return parts
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(parts):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
