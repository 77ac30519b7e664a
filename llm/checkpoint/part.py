"""A rank's part of a checkpoint: files that lie in memory are written and described, then the manifest of them all."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
from crc32c import crc32c

from llm.checkpoint.format import (
    FORMAT,
    ITEMSIZE,
    Commit,
    DataFile,
    PartEntry,
    PartManifest,
    Piece,
    Tensor,
    block_size,
    pack_checksums,
    part_name,
)
from llm.checkpoint.image import Box, FileImage
from llm.utils.storage import Storage


class Described(NamedTuple):
    """A file, and what is in it: (name, one piece of the tensor)."""

    file: DataFile
    pieces: list[tuple[str, Tensor]]


def describe(boxes: Sequence[Box], image: FileImage, index: int, data: memoryview) -> Described:
    """Take the checksums of file number ``index`` of a rank. ``data`` is the whole file."""
    header = len(image.header)
    file = DataFile(name=image.name, bytes=image.size, header=header, header_crc32c=crc32c(image.header))
    return Described(file, list(_pieces(boxes, image, index, data)))


def _pieces(boxes: Sequence[Box], image: FileImage, index: int, data: memoryview) -> Iterator[tuple[str, Tensor]]:
    for slot in image.slots:
        box = boxes[slot.box]
        size = math.prod(slot.shape) * ITEMSIZE[box.dtype]
        block, end = block_size(size), slot.begin + size
        checksums = array("I", (crc32c(data[at : min(at + block, end)]) for at in range(slot.begin, end, block)))
        piece = Piece(
            offset=[a + b for a, b in zip(box.offset, slot.within, strict=True)],
            shape=slot.shape,
            file=index,
            begin=slot.begin,
            block=block,
            crc32c=pack_checksums(checksums),
        )
        yield box.name, Tensor(dtype=box.dtype, shape=box.shape, pieces=[piece], placement=box.placement)


def write_manifest(
    storage: Storage, commit: Commit, rank: int, files: Iterable[Described], rng: dict[str, str]
) -> PartEntry:
    """Write the manifest of a rank's ``files``, which are durable: from here on the rank's part is complete."""
    tensors: dict[str, Tensor] = {}
    listed = []
    for file, pieces in files:
        listed.append(file)
        for name, tensor in pieces:
            if name in tensors:
                tensors[name].pieces.extend(tensor.pieces)
            else:
                tensors[name] = tensor
    part = PartManifest(format=FORMAT, rank=rank, files=listed, tensors=tensors, rng=rng)
    data = msgspec.json.encode(part)
    entry = PartEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=sum(file.bytes for file in listed))
    storage.create(f"{commit.path}/{part_name(rank, entry.bytes, entry.sha256)}", data)
    return entry
