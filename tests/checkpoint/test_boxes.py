"""Arithmetic of boxes."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm.checkpoint.boxes import Box, Index, merge, of_bytes, overlap, ranges, slabs, within

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    pairs = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in pairs), tuple(b - a for a, b in pairs))


def cells(box):
    return {tuple(o + i for o, i in zip(box.offset, place, strict=True)) for place in np.ndindex(*box.shape)}


@given(st.data())
def test_overlap_is_what_both_have(data):
    shape = data.draw(shapes)
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = overlap(a, b)
    assert (cells(common) if common else set()) == cells(a) & cells(b)
    if common:
        assert cells(within(common, a.offset)) == {
            tuple(x - o for x, o in zip(cell, a.offset, strict=True)) for cell in cells(common)
        }


@given(st.data())
def test_an_index_finds_what_a_look_at_all_finds(data):
    shape = data.draw(shapes)
    boxes = data.draw(st.lists(boxes_in(shape), min_size=0, max_size=12))
    asked = data.draw(boxes_in(shape))
    index = Index(boxes)
    assert dict(index.hits(asked)) == {i: found for i, box in enumerate(boxes) if (found := overlap(box, asked))}
    clashing = any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    clash = index.clash()
    assert (clash is not None) == clashing
    if clash is not None:
        assert clash[0] != clash[1]
        assert overlap(boxes[clash[0]], boxes[clash[1]])


@given(st.data())
def test_slabs_are_exactly_the_range(data):
    shape = data.draw(shapes)
    size = math.prod(shape)
    first, last = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    array = np.arange(size).reshape(shape)
    found = []
    for at, box in slabs(shape, first, last):
        assert at == first + len(found), "a gap"
        found += array[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].ravel().tolist()
    assert found == list(range(first, last))
    assert len(list(slabs(shape, first, last))) <= 2 * len(shape)


@given(st.data())
def test_ranges_have_all_of_a_box(data):
    shape = data.draw(shapes)
    box = data.draw(boxes_in(shape).filter(lambda box: box.size))
    least = data.draw(st.integers(1, 40))
    array = np.arange(math.prod(shape)).reshape(shape)
    wanted = set(array[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].ravel().tolist())
    found = ranges(shape, box, least)
    covered = {byte for begin, end in found for byte in range(begin, end)}
    assert wanted <= covered
    assert {min(covered), max(covered)} == {min(wanted), max(wanted)}
    if len(found) > 1:
        assert covered == wanted
        assert all(end - begin >= least for begin, end in found)


def test_small_cases():
    assert of_bytes([], [], 8) == Box((0,), (8,))
    assert of_bytes([1, 2], [3, 4], 2) == Box((1, 4), (3, 8))
    assert overlap(Box((0,), (0,)), Box((0,), (0,))) is None
    assert merge([(4, 6), (0, 2), (2, 3), (5, 9)]) == [(0, 3), (4, 9)]
    assert list(Index([]).hits(Box((0,), (3,)))) == []


def test_an_index_looks_at_few_boxes_whatever_the_layout():
    for axis in (0, 1):
        boxes = [Box((i * 4, 0), (4, 99)) if axis == 0 else Box((0, i * 4), (99, 4)) for i in range(5000)]
        with patch("llm.checkpoint.boxes.overlap", side_effect=overlap) as looked:
            assert [number for number, _ in Index(boxes).hits(Box((0, 0), (9, 9)))] == [0, 1, 2]
            assert looked.call_count == 3
