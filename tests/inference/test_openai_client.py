"""OpenAI's own client, unchanged, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from llm.data.chat import encode_prompt
from llm.inference.generate import generate
from llm.inference.load import load_model
from llm.inference.rows import CachedRows
from llm.inference.sampling import Sampling
from llm.utils.config import load
from tests.data.tokenizer_files import json_tokenizer
from tests.inference.server_process import KEY, LIMIT_S, ServerProcess, make_run

PROMPT = "To be, or not to be"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who's there?"}]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "hamlet")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(run, "--api-key-env", "SERVE_KEY", SERVE_KEY=KEY)
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=LIMIT_S, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def rows(run: Path) -> CachedRows:
    model, _ = load_model(load(f"{run}/config.yaml"), str(run), torch.device("cpu"))
    return CachedRows(model)


def test_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["hamlet"]
    assert client.models.retrieve("hamlet").owned_by == "llm"


def test_completions_are_those_of_the_model(client: openai.OpenAI, rows: CachedRows) -> None:
    tokenizer = json_tokenizer("llama3")
    done = client.completions.create(model="hamlet", prompt=[PROMPT, "Who"], temperature=0, max_tokens=12, n=2)
    sampling = Sampling(max_tokens=12)
    expected = generate(rows, tokenizer, [tokenizer.encode(PROMPT), tokenizer.encode("Who")], sampling)
    assert [each.text for each in done.choices] == [expected[at].text for at in (0, 0, 1, 1)]
    assert [each.index for each in done.choices] == [0, 1, 2, 3]
    assert {each.finish_reason for each in done.choices} == {"length"}
    assert done.usage is not None
    assert done.usage.completion_tokens == 4 * 12
    assert done.usage.prompt_tokens == len(tokenizer.encode(PROMPT)) + len(tokenizer.encode("Who"))


def test_streams_are_the_same_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "hamlet", "prompt": PROMPT, "seed": 4, "max_tokens": 40, "temperature": 1.5}
    whole = client.completions.create(**options)
    pieces = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].text for each in pieces if each.choices) == whole.choices[0].text
    assert [each.choices[0].finish_reason for each in pieces if each.choices][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage is not None
    assert whole.usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_and_echo(client: openai.OpenAI) -> None:
    done = client.completions.create(model="hamlet", prompt=PROMPT, echo=True, logprobs=3, max_tokens=5, temperature=0)
    choice = done.choices[0]
    assert choice.text.startswith(PROMPT)
    told = choice.logprobs
    assert told is not None
    assert told.tokens
    assert told.token_logprobs
    assert told.top_logprobs
    assert told.text_offset is not None
    assert "".join(told.tokens) == choice.text
    assert told.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in told.token_logprobs[1:])
    for token, value, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[-5:]:
        assert max(top.values()) == pytest.approx(value)  # the likeliest was taken
        assert token in top
    scored = client.completions.create(model="hamlet", prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(
        [None, *told.token_logprobs[1 : len(told.tokens) - 5]], abs=1e-4
    )


def test_chat(client: openai.OpenAI, rows: CachedRows) -> None:
    tokenizer = json_tokenizer("llama3")
    options: dict[str, Any] = {"model": "hamlet", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 20}
    done = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    prompt = encode_prompt(tokenizer, MESSAGES)
    expected = generate(rows, tokenizer, [prompt], Sampling(max_tokens=20))[0]
    message = done.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert done.choices[0].logprobs is not None
    told = done.choices[0].logprobs.content
    assert told is not None
    assert len(told) == 20
    assert all(len(each.top_logprobs) == 2 and each.top_logprobs[0].token == each.token for each in told)
    deltas = [each.choices[0].delta for each in client.chat.completions.create(**options, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(each.content or "" for each in deltas) == expected.text
    parts: list[Any] = [
        MESSAGES[0],
        {"role": "user", "content": [{"type": "text", "text": "Who's "}, {"type": "text", "text": "there?"}]},
    ]
    again = client.chat.completions.create(**{**options, "messages": parts})
    assert again.choices[0].message.content == expected.text


def test_stops_seeds_and_penalties(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "hamlet", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[5:8]
    stopped = client.completions.create(**options, stop=[stop, "no such text"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    assert client.completions.create(**options, frequency_penalty=2).choices[0].text != text
    drawn = [client.completions.create(**{**options, "temperature": 1, "seed": 9, "n": 3}) for _ in range(2)]
    texts = [[each.text for each in one.choices] for one in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    banned = client.completions.create(**options, extra_body={"top_k": 1, "repetition_penalty": 1.3})
    assert banned.choices[0].text != text


def test_errors(client: openai.OpenAI, server: ServerProcess) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model gpt-4"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1}, "temperature"),
        ({"n": 1000}, "n"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": ["x"] * 50}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"prompt": [5, 10_000_000]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"logprobs": 500}, "logprobs"),
    ]
    for wrong, param in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "hamlet", "prompt": PROMPT, **wrong})
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="hamlet", prompt="many words " * 600)
    assert caught.value.code == "context_length_exceeded"
    for changes in ({"tools": [{"type": "function"}]}, {"messages": []}, {"messages": [{"role": "nobody"}]}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "hamlet", "messages": MESSAGES, **changes})
        assert caught.value.param == next(iter(changes))
