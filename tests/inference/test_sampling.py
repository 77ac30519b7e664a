"""The next token: its distribution, its log-probabilities, and the text that tokens make one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.data.tokenizer import ByteTokenizer
from llm.inference.sampling import Row, Sampling, choose, pick, probabilities
from llm.inference.text import TextStream

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0, 0.0]])


def warped(sampling: Sampling) -> torch.Tensor:
    """What transformers draws from."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(theirs.MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor([[4, 0]]), LOGITS.clone()).softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.0, repetition_penalty=1.3),
        Sampling(temperature=1.2, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=0.8),
    ],
)
def test_distributions_are_those_of_transformers(sampling: Sampling) -> None:
    found = probabilities(LOGITS, [Row(sampling, [4], [0])])
    torch.testing.assert_close(found, warped(sampling))


def test_rows_have_their_own_settings_and_random_numbers() -> None:
    rows = [
        Row(Sampling(), [0]),
        Row(Sampling(temperature=1.0, seed=1), [0]),
        Row(Sampling(temperature=5.0, seed=2), [0]),
    ]
    found = probabilities(LOGITS.repeat(3, 1), rows)
    assert found[0].tolist() == [0, 0, 0, 0, 1, 0]
    torch.testing.assert_close(found[1], LOGITS[0].softmax(-1))
    counts = torch.zeros(6)
    for _ in range(1500):
        chosen = choose(LOGITS.repeat(3, 1), rows, 6)
        assert chosen[0].token == 4
        counts[chosen[1].token] += 1
    torch.testing.assert_close(counts / 1500, found[1], atol=0.05, rtol=0)


def test_generated_tokens_are_made_less_likely_once_or_each_time() -> None:
    sampling = Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    found = probabilities(LOGITS, [Row(sampling, [1], [4, 4, 0])])
    expected = LOGITS - torch.tensor([0.75, 0, 0, 0, 1.0, 0])
    torch.testing.assert_close(found, expected.softmax(-1))


def test_log_probabilities_are_the_models() -> None:
    row = Row(Sampling(temperature=0.0, repetition_penalty=50.0, logprobs=2), [4])
    (chosen,) = choose(LOGITS, [row], 6)
    own = LOGITS[0].log_softmax(-1)
    assert chosen.token == 0  # 4 is there already
    assert chosen.logprob == pytest.approx(float(own[0]))
    assert chosen.top == pytest.approx({4: float(own[4]), 0: float(own[0])})
    (none,) = choose(LOGITS, [replace_sampling(row, logprobs=0)], 6)
    assert none.top == {}


def replace_sampling(row: Row, **changes: int) -> Row:
    return Row(replace(row.sampling, **changes), row.prompt)


def test_tokens_that_no_text_has_are_never_taken() -> None:
    rows = [Row(Sampling(), [0]), Row(Sampling(temperature=1.0, seed=0), [0])]
    for _ in range(50):
        assert all(each.token < 4 for each in choose(LOGITS.repeat(2, 1), rows, 4))


def test_a_draw_lands_where_the_probabilities_say() -> None:
    table = torch.tensor([[0.25, 0.0, 0.75]])
    assert [int(pick(table, [draw])[0]) for draw in (0.0, 0.2, 0.25, 0.999999)] == [0, 0, 2, 2]


def test_settings_that_cannot_be_are_named() -> None:
    for settings, message in [
        ({"temperature": -1.0}, "temperature=-1.0: between 0 and 100"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: above 0, at most 1"),
        ({"stop": ("a", "")}, "stop="),
        ({"logprobs": 21}, "logprobs=21: 0 to 20"),
        ({"max_tokens": -1}, "max_tokens=-1: 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sampling(**settings)  # type: ignore[arg-type]


@given(st.binary(max_size=40), st.lists(st.sampled_from(["ab", "b", "é", "a\n", "zz"]), max_size=2))
def test_a_stream_of_tokens_is_the_text_up_to_a_stop(data: bytes, stop: list[str]) -> None:
    stream = TextStream(ByteTokenizer(), stop)
    pieces = []
    for token in data:
        pieces.append(stream.push(token))
        assert not any(each in "".join(pieces) for each in stop)
        if stream.stopped is not None:
            break
    pieces.append(stream.finish())
    text = data.decode(errors="replace")
    found = [text.index(each) for each in stop if each in text]
    assert "".join(pieces) == stream.text == (text[: min(found)] if found else text)
    assert (stream.stopped is not None) == bool(found)


def test_characters_are_shown_when_they_are_whole() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(token) for token in "aé😀".encode()] == ["a", "", "é", "", "", "", "😀"]
