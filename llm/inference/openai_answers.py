"""Answers in OpenAI's shapes: whole ones, and the pieces of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llm.data.tokenizer import Tokenizer
from llm.inference.batching import Request, Update
from llm.inference.sampling import Chosen


@dataclass
class Piece:
    """What several updates of one request say together."""

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish: str | None = None

    def add(self, update: Update) -> None:
        """One more."""
        self.text += update.text
        if update.chosen is not None:
            self.chosen.append(update.chosen)
        self.finish = self.finish or update.finish


class Answer(ABC):
    """The answer to one HTTP request for some ``requests`` of the engine's, which are its choices in their order."""

    kind = ""
    chunk = ""
    prefix = ""

    def __init__(self, model: str, tokenizer: Tokenizer, requests: Sequence[Request], logprobs: bool) -> None:
        self.tokenizer, self.requests, self.logprobs = tokenizer, requests, logprobs
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.started = [False] * len(requests)

    def usage(self) -> dict[str, Any]:
        """How many tokens it took; a prompt counts once, however many choices it has."""
        prompts = {id(request.text.row.prompt): request for request in self.requests}.values()
        prompt = sum(len(request.text.row.prompt) for request in prompts)
        added = sum(len(request.text.completion.tokens) for request in self.requests)
        shared = sum(request.shared for request in prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": added,
            "total_tokens": prompt + added,
            "prompt_tokens_details": {"cached_tokens": shared},
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All of it."""
        choices = [self.choice(at, piece, whole=True) for at, piece in enumerate(pieces)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def part(self, at: int, piece: Piece) -> dict[str, Any]:
        """What a stream says of one choice."""
        choice = self.choice(at, piece, whole=False)
        self.started[at] = True
        return {**self.head, "object": self.chunk, "choices": [choice]}

    def last(self) -> dict[str, Any]:
        """What a stream says at its end, where the usage is wanted."""
        return {**self.head, "object": self.chunk, "choices": [], "usage": self.usage()}

    @abstractmethod
    def choice(self, at: int, piece: Piece, whole: bool) -> dict[str, Any]:
        """One choice, or a part of it."""

    def spelled(self, token: int) -> str:
        """A token's text; half a character is U+FFFD."""
        return self.tokenizer.decode([token])


class CompletionAnswer(Answer):
    """Of ``/v1/completions``. ``echo``: with the prompts before the texts, whose spellings ``prompts`` are."""

    kind = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        logprobs: bool,
        prompts: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, tokenizer, requests, logprobs)
        self.prompts = prompts
        self.offsets = [0] * len(requests)

    def choice(self, at: int, piece: Piece, whole: bool) -> dict[str, Any]:
        """As :class:`Answer`."""
        echo = self.prompts is not None and not self.started[at]
        text = self.prompts[at] + piece.text if self.prompts is not None and echo else piece.text
        logprobs = self._logprobs(at, piece.chosen, echo) if self.logprobs else None
        return {"index": at, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, at: int, chosen: Sequence[Chosen], echo: bool) -> dict[str, Any]:
        request = self.requests[at]
        first = [Chosen(request.text.row.prompt[0])] if echo else []  # nothing is before it
        every = [*first, *(request.prompt_chosen if echo else ()), *chosen]
        spelled = [self.spelled(each.token) for each in every]
        offsets = []
        for text in spelled:
            offsets.append(self.offsets[at])
            self.offsets[at] += len(text)
        return {
            "tokens": spelled,
            "token_logprobs": [each.logprob for each in every],
            "top_logprobs": [None if each.top is None else self._by_text(each.top) for each in every],
            "text_offset": offsets,
        }

    def _by_text(self, top: dict[int, float]) -> dict[str, float]:
        """The likeliest first. Of tokens that are spelled alike, such as halves of characters, that one is told."""
        told: dict[str, float] = {}
        for token, value in top.items():
            told.setdefault(self.spelled(token), value)
        return told


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    kind, chunk = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, at: int, piece: Piece, whole: bool) -> dict[str, Any]:
        """As :class:`Answer`."""
        message: dict[str, Any] = {"content": piece.text}
        if whole or not self.started[at]:
            message = {"role": "assistant", **message}
        logprobs = {"content": [self._told(each) for each in piece.chosen]} if self.logprobs else None
        name = "message" if whole else "delta"
        return {"index": at, name: message, "logprobs": logprobs, "finish_reason": piece.finish}

    def _told(self, chosen: Chosen) -> dict[str, Any]:
        top = [self._entry(token, value) for token, value in (chosen.top or {}).items()]
        return {**self._entry(chosen.token, chosen.logprob), "top_logprobs": top}

    def _entry(self, token: int, value: float | None) -> dict[str, Any]:
        text = self.spelled(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}
