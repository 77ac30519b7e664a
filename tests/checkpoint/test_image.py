"""The layout of files: nothing is lost, nothing overlaps, and every rank works out the same."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from llm.checkpoint.format import ITEMSIZE, MAX_BLOCK, MIN_BLOCK, block_size
from llm.checkpoint.image import ALIGN, PAGE, Box, lay_out, owners, split, staging_bytes

shapes = st.lists(st.integers(1, 9), max_size=4)


@st.composite
def boxes(draw: st.DrawFn) -> list[Box]:
    made = []
    for index in range(draw(st.integers(0, 8))):
        shape = draw(shapes)
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        made.append(Box(name=f"t{index}", dtype=dtype, shape=shape, offset=[0] * len(shape), local_shape=shape))
    return made


@given(shapes, st.sampled_from([1, 2, 4, 8]), st.integers(1, 5000))
def test_a_box_is_cut_into_contiguous_pieces(shape: list[int], itemsize: int, limit: int) -> None:
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    position = 0
    for offset, piece in split(shape, itemsize, limit):
        assert sum(a * b for a, b in zip(offset, strides, strict=True)) == position
        assert math.prod(piece) * itemsize <= max(limit, itemsize)
        position += math.prod(piece)
    assert position == math.prod(shape)


@given(boxes(), st.integers(8, 20_000))
def test_files_hold_every_value_once(made: list[Box], limit: int) -> None:
    files = lay_out(made, 3, limit)
    counted = [0] * len(made)
    end_of_last = 0
    for index, file in enumerate(files):
        assert file.name == f"rank00003-{index:03d}.safetensors"
        assert file.position % PAGE == 0
        assert file.position >= end_of_last
        end_of_last = file.position + file.size
        header = json.loads(file.header[8:])
        assert len(file.header) % ALIGN == 0
        assert int.from_bytes(file.header[:8], "little") == len(file.header) - 8
        at = len(file.header)
        for slot, entry in zip(file.slots, header.values(), strict=True):
            itemsize = ITEMSIZE[made[slot.box].dtype]
            assert slot.begin == at == entry["data_offsets"][0] + len(file.header)
            assert slot.begin % itemsize == 0
            at += math.prod(slot.shape) * itemsize
            counted[slot.box] += math.prod(slot.shape)
        assert at == file.size
        assert at - len(file.header) <= max(limit, 8)
    assert counted == [math.prod(box.local_shape) for box in made]
    assert staging_bytes(files) >= end_of_last


@given(boxes(), st.integers(1, 200), st.integers(1, 8))
def test_files_are_as_few_and_as_even_as_whole_tensors_allow(made: list[Box], limit: int, count: int) -> None:
    sizes = [image.size - len(image.header) for image in lay_out(made, 0, limit, count)]
    total = sum(box.bytes for box in made)
    assert sum(sizes) == total
    if limit >= total:
        assert len(sizes) <= count
    largest = max((box.bytes for box in made), default=0)
    assert max(sizes, default=0) <= max(min(limit, -(-total // count) + largest), 8)


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12), st.integers(1, 6))
def test_what_several_ranks_hold_is_saved_once_and_spread_evenly(tensors: list[tuple[int, bool]], ranks: int) -> None:
    held: list[list[Box]] = [[] for _ in range(ranks)]
    for index, (rows, replicated) in enumerate(tensors):
        for rank in range(ranks):
            shape = [rows] if replicated else [rows * ranks]
            offset = [0] if replicated else [rows * rank]
            held[rank].append(Box(name=f"t{index}", dtype="F32", shape=shape, offset=offset, local_shape=[rows]))
    saves = owners(enumerate(held), {})
    assert saves == owners(reversed(list(enumerate(held))), {})
    for index, (_, replicated) in enumerate(tensors):
        savers = [rank for rank in range(ranks) if index in saves.get(rank, set())]
        assert len(savers) == (1 if replicated else ranks)
    loads = [sum(held[rank][index].bytes for index in saves.get(rank, ())) for rank in range(ranks)]
    biggest = max((4 * rows for rows, replicated in tensors if replicated), default=0)
    assert max(loads) - min(loads) <= biggest


@given(st.integers(0, 1 << 40))
def test_blocks_are_fine_enough_to_read_a_part(size: int) -> None:
    block = block_size(size)
    assert MIN_BLOCK <= block <= MAX_BLOCK
    assert block & (block - 1) == 0
    assert block in (MIN_BLOCK, MAX_BLOCK) or block <= size / 64
