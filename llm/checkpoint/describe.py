"""The checksums of a file that lies in memory, as its part manifest will have them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence

from crc32c import crc32c

from llm.checkpoint.format import ITEMSIZE, Piece, Tensor, block_size, pack_checksums
from llm.checkpoint.image import Box, FileImage


def describe(boxes: Sequence[Box], image: FileImage, index: int, data: memoryview) -> Iterator[tuple[str, Tensor]]:
    """What is in file number ``index`` of a rank: (name, one piece of the tensor). ``data`` is the whole file."""
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
