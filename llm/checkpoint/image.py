"""Where in which file each piece of a rank's state goes: safetensors files of bounded size, before any copy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from llm.checkpoint.format import ITEMSIZE, file_name

ALIGN = 64  # headers are padded to this, so that every tensor of a file is aligned for its type
PAGE = 4096  # files start on a page of the staging buffer: direct I/O wants that


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a tensor that this rank will save."""

    name: str
    dtype: str  # as safetensors names it
    shape: list[int]  # of the whole tensor
    offset: list[int]  # of the box
    local_shape: list[int]
    placement: str = ""

    @property
    def bytes(self) -> int:
        """Size of the box."""
        return math.prod(self.local_shape) * ITEMSIZE[self.dtype]


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A part of box number ``box`` in a file: ``shape`` values at ``within`` of the box, from byte ``begin`` on."""

    box: int
    within: list[int]
    shape: list[int]
    begin: int


class FileImage(msgspec.Struct, frozen=True, kw_only=True):
    """A data file as it lies in the staging buffer, ``size`` bytes from ``position`` on. ``header`` comes first."""

    name: str
    position: int
    size: int
    header: bytes
    slots: list[Slot]


def lay_out(boxes: Sequence[Box], rank: int, file_bytes: int, count: int = 1) -> list[FileImage]:
    """The files of ``rank``, none with more than ``file_bytes`` of data unless a single value is bigger.

    They are at most ``count`` and as even as whole tensors allow, or more where ``file_bytes`` is too little for that.
    Boxes are sorted by the size of their type, which keeps all of them aligned without gaps.
    """
    files: list[FileImage] = []
    position = 0
    for slots in _batches(boxes, file_bytes, count):
        image = _image(boxes, slots, file_name(rank, len(files)), position)
        files.append(image)
        position += -(-image.size // PAGE) * PAGE
    return files


def staging_bytes(files: Sequence[FileImage]) -> int:
    """Bytes of the buffer that holds ``files``."""
    return max((file.position + -(-file.size // PAGE) * PAGE for file in files), default=0)


def split(shape: Sequence[int], itemsize: int, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a row-major box into (offset, shape) of contiguous boxes of at most ``limit`` bytes."""
    size = math.prod(shape) * itemsize
    if size <= limit or not shape:
        yield [0] * len(shape), list(shape)
        return
    row = size // shape[0]
    if row <= limit:
        count = limit // row
        for start in range(0, shape[0], count):
            yield [start, *[0] * (len(shape) - 1)], [min(count, shape[0] - start), *shape[1:]]
        return
    for index in range(shape[0]):
        for offset, inner in split(shape[1:], itemsize, limit):
            yield [index, *offset], [1, *inner]


def _batches(boxes: Sequence[Box], file_bytes: int, count: int) -> Iterator[list[Slot]]:
    """Slots of one file after the other; ``begin`` counts from the first byte of data."""
    mean = -(-sum(box.bytes for box in boxes) // count)
    parts = [
        (index, within, shape)
        for index in sorted(range(len(boxes)), key=lambda each: -ITEMSIZE[boxes[each].dtype])
        for within, shape in split(boxes[index].local_shape, ITEMSIZE[boxes[index].dtype], min(file_bytes, mean))
    ]
    sizes = [math.prod(shape) * ITEMSIZE[boxes[index].dtype] for index, _, shape in parts]
    limit = _even(sizes, mean, file_bytes, count)
    batch: list[Slot] = []
    filled = 0
    for (index, within, shape), size in zip(parts, sizes, strict=True):
        if batch and filled + size > limit:
            yield batch
            batch, filled = [], 0
        batch.append(Slot(box=index, within=within, shape=shape, begin=filled))
        filled += size
    if batch:
        yield batch


def _even(sizes: Sequence[int], least: int, most: int, count: int) -> int:
    """The lowest limit from ``least`` on that fills at most ``count`` files in the order of ``sizes``, or ``most``."""

    def filled(limit: int) -> int:
        files, room = 0, 0
        for size in sizes:
            if not files or size > room:
                files, room = files + 1, limit
            room -= size
        return files

    if least >= most or filled(most) > count:
        return most
    if filled(least) <= count:
        return least
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if filled(middle) <= count else (middle + 1, most)
    return most


def _image(boxes: Sequence[Box], slots: Sequence[Slot], name: str, position: int) -> FileImage:
    entries: dict[str, Any] = {}
    seen: set[str] = set()
    for slot in slots:
        box = boxes[slot.box]
        key = box.name
        if key in seen:  # a second piece of the same tensor
            start = (a + b for a, b in zip(box.offset, slot.within, strict=True))
            key = f"{key}@{','.join(map(str, start))}"
        seen.add(key)
        end = slot.begin + math.prod(slot.shape) * ITEMSIZE[box.dtype]
        entries[key] = {"dtype": box.dtype, "shape": slot.shape, "data_offsets": [slot.begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    data = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    moved = [msgspec.structs.replace(slot, begin=slot.begin + len(header)) for slot in slots]
    return FileImage(name=name, position=position, size=len(header) + data, header=header, slots=moved)


def owners(holders: Iterable[tuple[int, Iterable[Box]]], load: Mapping[int, int]) -> dict[int, set[int]]:
    """Who saves what, when several ranks hold the same box: rank -> indices of the boxes that it saves.

    ``holders`` are (rank, its boxes that others may hold too), ``load`` the bytes that a rank saves besides. A box goes
    to the least loaded of those that hold it, the biggest first: the same on whichever rank this is worked out.
    """
    where: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    sizes: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
    for rank, boxes in holders:
        for index, box in enumerate(boxes):
            key = (box.name, tuple(box.offset), tuple(box.local_shape))
            where.setdefault(key, []).append((rank, index))
            sizes[key] = box.bytes
    load = dict(load)
    mine: dict[int, set[int]] = {}
    # What only one rank holds is settled first: it is the load that the rest is spread over.
    for key in sorted(where, key=lambda each: (len(where[each]) > 1, -sizes[each], each)):
        rank, index = min(where[key], key=lambda each: (load.get(each[0], 0), each))
        load[rank] = load.get(rank, 0) + sizes[key]
        mine.setdefault(rank, set()).add(index)
    return mine
