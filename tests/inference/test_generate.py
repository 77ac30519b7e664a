"""Text from a model: the same tokens as transformers, however rows are batched and whatever is kept of them."""

from __future__ import annotations

import pytest
import torch

from llm.data.tokenizer import ByteTokenizer
from llm.inference.generate import Completion, generate
from llm.inference.rows import CachedRows, RecomputedRows
from llm.inference.sampling import Sampling
from llm.model.transformer import Transformer
from tests.llm.test_hf_families import FAMILIES, ours, shape, theirs

PROMPTS = [[5, 9, 2, 7, 11, 3, 30, 8, 21], [14, 3], [1, 2, 3, 4, 5, 6]]
GREEDY = Sampling(max_tokens=20)


def run(model: Transformer, prompts: list[list[int]], sampling: Sampling, compiled: bool = False) -> list[Completion]:
    return generate(CachedRows(model, compiled), ByteTokenizer(), prompts, sampling)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_gives_the_tokens_that_transformers_gives(name: str) -> None:
    model = ours(shape(**FAMILIES[name][1]))
    reference = theirs(model)
    done = run(model, PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=20,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert completion.tokens == expected
        assert completion.finish == "length"


def test_a_cache_changes_nothing() -> None:
    model = ours(shape(window=5, full_every=2))
    plain = RecomputedRows(model, 64, torch.device("cpu"))
    sampling = Sampling(max_tokens=20, temperature=0.9, top_p=0.9, seed=3, logprobs=2)
    expected = generate(plain, ByteTokenizer(), PROMPTS, sampling)
    for one, other in zip(run(model, PROMPTS, sampling), expected, strict=True):
        assert one.tokens == other.tokens
        for mine, its in zip(one.chosen, other.chosen, strict=True):
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)
            assert mine.top is not None
            assert its.top is not None
            assert list(mine.top) == list(its.top)


def test_a_compiled_step_gives_the_same_tokens() -> None:
    model = ours(shape(window=5, full_every=2))
    expected = run(model, PROMPTS, GREEDY)
    assert [each.tokens for each in run(model, PROMPTS, GREEDY, compiled=True)] == [each.tokens for each in expected]


def test_what_else_is_in_the_batch_changes_no_row() -> None:
    model = ours(shape())
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5)
    together = run(model, PROMPTS, sampling)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert run(model, [prompt], sampling)[0].tokens == completion.tokens


def test_a_row_ends_at_its_own_limit_and_at_the_models() -> None:
    model = ours(shape())
    samplings = [Sampling(max_tokens=3), Sampling(max_tokens=0), Sampling(max_tokens=500)]
    done = generate(CachedRows(model), ByteTokenizer(), PROMPTS, samplings, limit=64)
    assert [len(each.tokens) for each in done] == [3, 0, 64 - len(PROMPTS[2])]


def test_stops_end_a_row_and_are_left_out() -> None:
    model = ours(shape())
    tokens = run(model, PROMPTS, GREEDY)[0].tokens
    text = ByteTokenizer().decode(tokens)
    stop = text[4:6]
    first = text.index(stop)
    done = run(model, PROMPTS, Sampling(max_tokens=20, stop=("no such text", stop)))[0]
    assert (done.text, done.finish, done.tokens) == (text[:first], "stop", tokens[: first + 2])
    done = run(model, PROMPTS, Sampling(max_tokens=20, stop_tokens=(tokens[6],)))[0]
    place = tokens.index(tokens[6])
    assert (done.tokens, done.text, done.finish) == (tokens[: place + 1], text[:place], "stop")


def test_prompts_without_room_are_refused() -> None:
    rows = CachedRows(ours(shape()))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(rows, ByteTokenizer(), [[1], []], GREEDY)
    with pytest.raises(ValueError, match="prompt 0 has 64 tokens, and the model takes 64"):
        generate(rows, ByteTokenizer(), [[1] * 64], GREEDY, limit=64)
    assert generate(rows, ByteTokenizer(), [], GREEDY) == []
