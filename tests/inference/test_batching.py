"""Continuous batching: whoever else is in the batch, and however the cache is cut up, a text is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from llm.data.tokenizer import ByteTokenizer
from llm.inference.batching import Busy, Engine, Request, Update
from llm.inference.generate import Completion, generate
from llm.inference.paged import BLOCK, Blocks, PagedCache, Pool, Span
from llm.inference.rows import CachedRows
from llm.inference.sampling import Sampling
from llm.model.transformer import Transformer
from tests.llm.test_hf_families import FAMILIES, ours, shape

CPU = torch.device("cpu")
PROMPTS = [[(7 * at + row) % 31 for at in range(length)] for row, length in enumerate((1, 3, 15, 16, 17, 33, 40))]
LIMIT_S = 60.0
pytestmark = pytest.mark.usefixtures("one_thread")


class Listener:
    """What an engine tells, by request."""

    def __init__(self) -> None:
        self.updates: dict[Request, list[Update]] = {}
        self.changed = threading.Condition()

    def __call__(self, updates: list[Update]) -> None:
        with self.changed:
            for update in updates:
                self.updates.setdefault(update.request, []).append(update)
            self.changed.notify_all()

    def wait(self, done: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(done, LIMIT_S)

    def finish(self, requests: list[Request]) -> list[Completion]:
        self.wait(lambda: all(self.updates.get(each, [Update(each)])[-1].finish for each in requests))
        return [each.text.completion for each in requests]


def run(model: Transformer, prompts: list[list[int]], samplings: list[Sampling], **options: int) -> list[Completion]:
    """All at once through an engine that leaks nothing."""
    listener = Listener()
    engine = Engine(model, ByteTokenizer(), listener, **{"blocks": 100, **options})
    try:
        requests = [engine.request(*each) for each in zip(prompts, samplings, strict=True)]
        engine.submit(requests)
        done = listener.finish(requests)
        for request in requests:
            told = listener.updates[request]
            assert "".join(update.text for update in told) == request.text.completion.text
            assert [update.chosen.token for update in told if update.chosen] == request.text.completion.tokens
        assert engine.blocks.free == engine.blocks.count
        return done
    finally:
        engine.close()


def same(one: list[Completion], other: list[Completion]) -> None:
    """The same tokens, and log-probabilities within float32's 1e-4."""
    for mine, its in zip(one, other, strict=True):
        assert (mine.tokens, mine.text, mine.finish) == (its.tokens, its.text, its.finish)
        assert len(mine.chosen) == len(its.chosen)
        for a, b in zip(mine.chosen, its.chosen, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"step_tokens": 8, "max_batch": 3}) for name in FAMILIES] + [("llama 2", {}), ("llama 2", {"blocks": 6})],
)
def test_a_batch_gives_each_request_what_it_gets_alone(name: str, options: dict[str, int]) -> None:
    model = ours(shape(**FAMILIES[name][1]))
    samplings = [
        Sampling(max_tokens=14, temperature=row % 2, top_p=0.9, seed=row, logprobs=2, presence_penalty=row % 3)
        for row in range(len(PROMPTS))
    ]
    alone = [
        generate(CachedRows(model), ByteTokenizer(), [prompt], sampling, limit=64)[0]
        for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    same(run(model, PROMPTS, samplings, **options), alone)


def test_logits_in_a_shared_batch_are_those_of_the_request_alone() -> None:
    model = ours(shape(window=20, full_every=2))
    pool = Pool(model.config, 12, torch.float32, CPU)
    for each in (*pool.keys, *pool.values):
        each.fill_(torch.nan)  # what others left behind
    pool.clear(range(13))
    spans = [([1], 0, 1), ([2, 3, 4], 0, 40), ([5, 6], 0, 17)]
    rows = [[(5 * at + row) % 31 for at in range(count)] for row, (_, _, count) in enumerate(spans)]
    with torch.no_grad():
        for first, count in ((0, 1), (1, 39), (40, 1)):  # each row's tokens come in three steps
            parts = [
                (Span(blocks, first, min(count, len(row) - first)), row[first : first + count])
                for (blocks, _, _), row in zip(spans, rows, strict=True)
                if len(row) > first
            ]
            if not parts:
                continue
            cache = PagedCache(pool, [span for span, _ in parts])
            tokens = torch.tensor([[token for _, part in parts for token in part]])
            logits = model(tokens, positions=cache.positions, cache=cache)[0]
            at = 0
            for span, part in parts:
                row = next(row for (blocks, _, _), row in zip(spans, rows, strict=True) if blocks == span.blocks)
                alone = model(torch.tensor([row]))[0, first : first + len(part)]
                torch.testing.assert_close(logits[at : at + len(part)], alone, atol=1e-4, rtol=0)
                at += len(part)


def test_a_full_cache_makes_the_youngest_wait() -> None:
    model = ours(shape())
    listener = Listener()
    engine = Engine(model, ByteTokenizer(), listener, blocks=5)
    try:
        requests = [engine.request(prompt, Sampling(max_tokens=45)) for prompt in ([1, 2], [3, 4], [5, 6])]
        engine.submit(requests)
        done = listener.finish(requests)
        assert engine.preemptions
        assert engine.blocks.free == 5
    finally:
        engine.close()
    alone = generate(CachedRows(model), ByteTokenizer(), [[1, 2], [3, 4], [5, 6]], Sampling(max_tokens=45))
    assert [each.tokens for each in done] == [each.tokens for each in alone]


def test_the_same_beginning_is_computed_once() -> None:
    model = ours(shape())
    listener = Listener()
    engine = Engine(model, ByteTokenizer(), listener, blocks=20)
    beginning = list(range(3 * BLOCK))
    try:
        done = []
        for _ in range(2):
            request = engine.request([*beginning, 5], Sampling(max_tokens=8, logprobs=0))
            engine.submit([request])
            done += listener.finish([request])
        assert request.shared == 3 * BLOCK
        same(done[:1], done[1:])
        told = engine.request([*beginning, 5], Sampling(max_tokens=1, logprobs=1), tell_prompt=True)
        engine.submit([told])
        listener.finish([told])
        with torch.no_grad():
            expected = model(torch.tensor([[*beginning, 5]]))[0].log_softmax(-1)
        assert len(told.prompt_chosen) == 3 * BLOCK
        for at, chosen in enumerate(told.prompt_chosen):
            assert chosen.token == told.tokens[at + 1]
            assert chosen.logprob == pytest.approx(float(expected[at, chosen.token]), abs=1e-4)
    finally:
        engine.close()


def test_cancelled_requests_leave_and_a_full_queue_refuses() -> None:
    listener = Listener()
    engine = Engine(ours(shape()), ByteTokenizer(), listener, blocks=20, max_batch=1, max_queue=1)
    try:
        running, waiting = (engine.request([1], Sampling(max_tokens=60)) for _ in range(2))
        engine.submit([running, waiting])
        with pytest.raises(Busy):
            engine.submit([engine.request([1], Sampling())])
        engine.cancel([waiting, running])
        listener.finish([running, waiting])
        assert listener.updates[waiting][-1].finish == "cancelled"
        assert engine.active == 0
        assert engine.blocks.free == 20
        with pytest.raises(ValueError, match="the model takes 64"):
            engine.request([1] * 64, Sampling())
    finally:
        engine.close()


def test_a_step_that_fails_ends_all_requests() -> None:
    listener = Listener()
    engine = Engine(ours(shape()), ByteTokenizer(), listener, blocks=20)
    request = engine.request([10_000], Sampling())  # no such token: the embedding raises
    engine.submit([request])
    listener.wait(lambda: request in listener.updates)
    assert listener.updates[request][-1].finish == "failed"
    assert isinstance(engine.failed, IndexError)
    with pytest.raises(Busy):
        engine.submit([engine.request([1], Sampling())])
    engine.close()


def test_blocks_that_are_shared_stay_until_their_last_user_leaves() -> None:
    blocks = Blocks(4)
    tokens = list(range(2 * BLOCK + 1))
    mine = [block for _ in range(3) if (block := blocks.take()) is not None]
    for number in range(2):
        blocks.name(mine, number, tokens[number * BLOCK : (number + 1) * BLOCK])
    other = blocks.shared(tokens)
    assert other == mine[:2]
    assert blocks.shared(tokens[: 2 * BLOCK]) == mine[:1]  # the last token has to be computed
    blocks.give(mine[:1])
    blocks.give(mine)
    assert blocks.free == 2
    assert {blocks.take(), blocks.take(), blocks.take()} == {mine[2], 4, None}
    blocks.give(other)
    assert blocks.free == 2
    assert blocks.take() == other[1]  # the end of a text is forgotten before its beginning
    assert blocks.shared(tokens) == other[:1]
