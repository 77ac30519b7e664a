"""The numbers that evaluations are told in, against other ways to get them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.utils import get_rolling_token_windows

from llm.eval.metrics import Perplexity, accuracy, exact_match, pass_at_k, windows


@given(st.integers(0, 60), st.integers(1, 12))
def test_windows_without_overlap_are_the_harness_s(count: int, length: int) -> None:
    tokens = list(range(100, 100 + count))
    ours = [(each.inputs, each.targets[-each.scored :]) for each in windows(tokens, 7, length)]
    theirs = list(get_rolling_token_windows(tokens, 7, length, 1))
    assert ours == [(list(inputs), list(targets)) for inputs, targets in theirs]


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_every_token_is_scored_once_after_enough_others(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    tokens = list(range(100, 100 + count))
    scored = []
    for each in windows(tokens, 7, length, stride):
        assert len(each.inputs) == len(each.targets) <= length
        for at in range(len(each.targets) - each.scored, len(each.targets)):
            scored.append(each.targets[at])
            place = each.targets[at] - 100
            assert each.inputs[: at + 1] == [7, *tokens][place - at : place + 1]
            assert at >= min(place, length - stride)
    assert scored == tokens


def test_a_stride_that_leaves_tokens_out_is_refused() -> None:
    with pytest.raises(ValueError, match="a stride of 9"):
        list(windows([1, 2], 0, 8, 9))


def test_perplexity() -> None:
    texts = {"so it goes": -9.0, "né à Paris": -21.5}
    total = sum((Perplexity.of(text, value, 4) for text, value in texts.items()), Perplexity())
    assert (total.tokens, total.bytes, total.words) == (8, 22, 6)
    by = {"bytes": [(value, len(text.encode())) for text, value in texts.items()]}
    assert total.per_byte == pytest.approx(weighted_perplexity(by["bytes"]))
    assert total.bits_per_byte == pytest.approx(bits_per_byte(by["bytes"]))
    assert total.per_token == pytest.approx(math.exp(30.5 / 8))
    assert total.per_word == pytest.approx(math.exp(30.5 / 6))
    assert math.isnan(Perplexity().per_token)
    assert Perplexity(-1e6, 1, 1, 1).per_word == math.inf


def test_shares() -> None:
    assert accuracy([True, False, True, True]) == 0.75
    assert math.isnan(accuracy([]))
    assert exact_match([" a ", "b", "C"], ["a", "b\n", "c"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations(range(samples), k))
        share = sum(any(each < correct for each in draw) for draw in draws) / len(draws)
        assert pass_at_k(samples, correct, k) == pytest.approx(share)


def test_pass_at_k_of_many() -> None:
    assert 0 < pass_at_k(100_000, 1, 10) == pytest.approx(1e-4)
    for wrong in ((5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0)):
        with pytest.raises(ValueError, match="k must be"):
            pass_at_k(*wrong)
