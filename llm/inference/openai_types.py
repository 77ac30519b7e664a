"""Requests as OpenAI's clients write them, and what they ask of us; errors in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from llm.inference.sampling import Sampling
from llm.inference.serving import ServeConfig


class Refused(Exception):
    """An answer that is no text: its HTTP status, and OpenAI's message, parameter and code."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none, whatever is asked


class Asked(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request have. ``top_k`` and those after it are not OpenAI's, but vLLM's."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Any = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None

    @property
    def choices(self) -> int:
        """How many texts each prompt gets."""
        return 1 if self.n is None else self.n


class CompletionBody(Asked, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(Asked, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    modalities: Any = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# What changes no text here. Whatever else these say is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_Body = TypeVar("_Body", bound=Asked)


def parse(data: bytes, kind: type[_Body], config: ServeConfig) -> _Body:
    """The request in ``data``. Raises Refused, 400, for what is none, and names the parameter."""
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(400, f"{error}", _param(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}", code="invalid_json") from error
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise Refused(400, f"{name} is not supported", name, "unsupported_parameter")
    if not 1 <= body.choices <= config.max_choices:
        raise Refused(400, f"n={body.choices}: this server gives 1 to {config.max_choices} choices", "n")
    best_of = getattr(body, "best_of", None)
    if best_of not in (None, body.choices):
        raise Refused(400, f"best_of={best_of}: only the value of n is supported", "best_of", "unsupported_parameter")
    if body.stop is not None and not isinstance(body.stop, str) and len(body.stop) > config.max_stop:
        raise Refused(400, f"stop: {len(body.stop)} texts, at most {config.max_stop}", "stop")
    if body.stream_options is not None and not body.stream:
        raise Refused(400, "stream_options: only with stream=true", "stream_options")
    return body


def completion_prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts: texts, or tokens. Raises Refused."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise Refused(400, "prompt: an empty list", "prompt")
    if all(isinstance(each, int) for each in prompt):
        return [[each for each in prompt if isinstance(each, int)]]
    if any(isinstance(each, int) for each in prompt):
        raise Refused(400, "prompt: a list of texts, of tokens, or of lists of tokens; not of several kinds", "prompt")
    return [each for each in prompt if not isinstance(each, int)]


def chat_messages(body: ChatBody) -> list[dict[str, Any]]:
    """The messages, each with one text for its content. Raises Refused for parts that are none."""
    messages = []
    for number, message in enumerate(body.messages):
        content = message.get("content")
        if isinstance(content, list):
            where = f"messages[{number}].content"
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise Refused(400, f"{where}: only parts of type text are supported", "messages")
            texts = [part.get("text") for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise Refused(400, f"{where}: a part without text", "messages")
            content = "".join(map(str, texts))
        messages.append({**message, "content": content})
    return messages


def completion_sampling(body: CompletionBody) -> Sampling:
    """How each prompt is continued. Raises Refused."""
    return _sampling(body, 16 if body.max_tokens is None else body.max_tokens, body.logprobs, ())


def chat_sampling(body: ChatBody, room: int, ends: tuple[int, ...]) -> Sampling:
    """The same of a chat, whose turns end with one of ``ends``; without a limit of its own it has ``room`` tokens."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused(400, "top_logprobs: only with logprobs=true", "top_logprobs")
    limits = [each for each in (body.max_completion_tokens, body.max_tokens) if each is not None]
    return _sampling(body, min(limits, default=room), (body.top_logprobs or 0) if body.logprobs else None, ends)


def _sampling(body: Asked, max_tokens: int, logprobs: int | None, ends: tuple[int, ...]) -> Sampling:
    stop = body.stop or ()
    wanted = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),  # vLLM's -1 is all
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": body.seed,
    }
    given: Mapping[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    try:
        return Sampling(
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_tokens=(*(body.stop_token_ids or ()), *(() if body.ignore_eos else ends)),
            ignore_end=bool(body.ignore_eos),
            **given,
        )
    except ValueError as error:
        raise Refused(400, str(error), str(error).partition("=")[0]) from error


def _param(message: str) -> str | None:
    """The parameter that a message of msgspec's is about."""
    for pattern in (r"unknown field `([^`]+)`", r"required field `([^`]+)`", r"at `\$\.([^`.\[]+)"):
        if found := re.search(pattern, message):
            return found[1]
    return None
