"""Guesses of a small model change how fast the large one writes, and not what."""

from __future__ import annotations

import pytest
import torch

from llm.data.tokenizer import ByteTokenizer
from llm.inference.generate import generate
from llm.inference.rows import CachedRows
from llm.inference.sampling import Sampling
from llm.inference.speculate import Guesses, speculate
from tests.llm.test_hf_families import ours, shape

PROMPT = [5, 9, 2, 7, 11]
LARGE = ours(shape(window=6, full_every=2))
SMALL = ours(shape(n_layers=1))


class Tokenizer(ByteTokenizer):
    vocab_size = 60


@pytest.mark.parametrize("draft", [SMALL, LARGE])
@pytest.mark.parametrize("ahead", [1, 3])
def test_greedy_tokens_are_those_of_the_large_model(draft: object, ahead: int) -> None:
    sampling = Sampling(max_tokens=24, logprobs=2, repetition_penalty=1.1, stop=("no such",))
    guesses = Guesses()
    (expected,) = generate(CachedRows(LARGE), Tokenizer(), [PROMPT], sampling, 64)
    rows, helper = CachedRows(LARGE), CachedRows(draft)  # type: ignore[arg-type]
    found = speculate(rows, helper, Tokenizer(), PROMPT, sampling, ahead, 64, guesses)
    assert (found.tokens, found.text, found.finish) == (expected.tokens, expected.text, expected.finish)
    for mine, its in zip(found.chosen, expected.chosen, strict=True):
        assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)
    assert guesses.made > 0
    if draft is LARGE:
        assert guesses.taken == guesses.made


def test_drawn_tokens_have_the_large_models_distribution() -> None:
    """The second token, after a first one of any kind: against all ways to get there."""
    table = torch.zeros(60)
    for seed in range(400):
        sampling = Sampling(max_tokens=2, temperature=1.3, top_k=2, seed=seed)
        found = speculate(CachedRows(LARGE), CachedRows(SMALL), Tokenizer(), PROMPT, sampling, 2)
        table[found.tokens[1]] += 1
    with torch.no_grad():
        expected = torch.zeros(60)
        for token, chance in _next(PROMPT):
            for after, share in _next([*PROMPT, token]):
                expected[after] += chance * share
    torch.testing.assert_close(table / table.sum(), expected, atol=0.1, rtol=0)


def _next(tokens: list[int]) -> list[tuple[int, float]]:
    logits = LARGE(torch.tensor([tokens]))[0, -1] / 1.3
    values, indices = logits.topk(2)
    return list(zip(indices.tolist(), values.softmax(-1).tolist(), strict=True))


def test_stops_and_limits_hold_within_guesses() -> None:
    for allowed in (0, 1, 2, 7):
        sampling = Sampling(max_tokens=allowed)
        found = speculate(CachedRows(LARGE), CachedRows(LARGE), Tokenizer(), PROMPT, sampling, 4)
        assert len(found.tokens) == allowed
    (plain,) = generate(CachedRows(LARGE), Tokenizer(), [PROMPT], Sampling(max_tokens=20))
    stop = Sampling(max_tokens=20, stop_tokens=(plain.tokens[5],))
    (expected,) = generate(CachedRows(LARGE), Tokenizer(), [PROMPT], stop)
    found = speculate(CachedRows(LARGE), CachedRows(LARGE), Tokenizer(), PROMPT, stop, 4)
    assert (found.tokens, found.finish) == (expected.tokens, "stop")
