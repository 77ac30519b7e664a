"""Packing puts whole documents into rows: nothing is lost, nothing is learnt twice, and hardly any space is left."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llm.data.packing import best_fit, pack

lengths_and_row = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 17))


def documents(lengths: list[int]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Tokens that all differ, from 1 on, and where documents begin."""
    total = sum(lengths)
    starts = np.zeros(total, bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    return np.arange(1, total + 1, dtype=np.uint16), starts


def pieces(tokens: NDArray[np.uint16], starts: NDArray[np.bool_], row: int) -> list[list[int]]:
    """What stands between starts, row by row, without filling."""
    found = []
    for at in range(0, len(tokens), row):
        bounds = [*np.flatnonzero(starts[at : at + row]), row]
        assert bounds[0] == 0
        found += [tokens[at + a : at + b].tolist() for a, b in pairwise(bounds)]
    return [piece for piece in found if piece[0]]


@given(lengths_and_row)
def test_every_token_but_a_first_one_is_learnt_once(case: tuple[list[int], int]) -> None:
    lengths, row = case
    tokens, starts = documents(lengths)
    packed = pack(tokens, starts, None, row)
    assert len(packed.tokens) == len(packed.starts) == len(packed.loss) == packed.rows * row
    learnt = np.sort(packed.tokens[packed.loss])
    assert learnt.tolist() == tokens[~starts].tolist()
    assert packed.used == np.count_nonzero(packed.tokens)
    assert packed.cut == sum(length > row for length in lengths)
    whole = {(begin, length) for begin, length in zip(np.flatnonzero(starts) + 1, lengths, strict=True)}
    for piece in pieces(packed.tokens, packed.starts, row):
        assert piece == list(range(piece[0], piece[0] + len(piece)))  # of one document, in order
        if len(piece) < row:  # a whole document, or the end of a cut one
            assert any(first + length == piece[-1] + 1 for first, length in whole)


@given(lengths_and_row)
def test_what_is_not_to_be_learnt_stays_so(case: tuple[list[int], int]) -> None:
    lengths, row = case
    tokens, starts = documents(lengths)
    loss = tokens % 3 > 0
    packed = pack(tokens, starts, loss, row)
    assert np.sort(packed.tokens[packed.loss]).tolist() == tokens[loss & ~starts].tolist()


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_row_overflows_and_best_fit_is_near_the_least_number_of_rows(lengths: list[int]) -> None:
    rows, offsets, count = best_fit(np.array(lengths), 64)
    used = np.zeros(count * 64, int)
    for row, offset, length in zip(rows, offsets, lengths, strict=True):
        assert offset + length <= 64
        used[row * 64 + offset : row * 64 + offset + length] += 1
    assert used.max() == 1
    # 11/9 of the fewest rows + 6/9 (Dosa, 2007); these are at most 1.5 times this bound (Martello, Toth, 1990).
    assert count <= 11 / 9 * max(-(-sum(lengths) // 64), sum(length > 32 for length in lengths)) * 1.5 + 1


@pytest.mark.parametrize("row", [1025, 2049])
def test_hardly_any_space_is_left_in_a_real_mixture_of_lengths(row: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 5000).astype(int) + 1
    tokens, starts = documents(lengths.tolist())
    packed = pack(tokens, starts, None, row)
    assert packed.used / len(packed.tokens) > 0.995


def test_nothing_packs_to_nothing() -> None:
    packed = pack(np.zeros(0, np.uint16), np.zeros(0, bool), None, 8)
    assert (packed.rows, packed.used, len(packed.tokens)) == (0, 0, 0)
