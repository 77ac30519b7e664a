"""Conversations as tokens to train on: a chat template, and a mask of what the assistant wrote.

A template's text and a message's text are one string when the template has been rendered, and a message may spell
``<|im_end|>``. So such spellings are broken up in the messages before the template is rendered; what then spells a
special token was written by the template, and only that becomes one. In the assistant's own messages this holds for
tokens that are special by themselves; in all others, also for added tokens that the template writes (``<think>``).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from llm.data.tokenizer import Part, Tokenizer
from llm.utils.config import ConfigError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OVERLAPS = 8  # how often breaking one spelling up may leave another that began within it
Message = dict[str, Any]


def render_chat(
    messages: Sequence[Message], template: str = CHATML, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """The conversation as one text; ``variables`` are the template's further ones, such as ``eos_token``.

    For reading alone: encoded, a message's ``<|im_end|>`` would look like the template's. Raises ValueError for
    messages that are not well formed or that the template refuses, ConfigError for a template that does not parse.
    """
    check(messages, assistant=False)
    return _Template(template).render(messages, add_generation_prompt, variables)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Tokens (T) of a conversation, and whether each is the assistant's (T), the token that ends its turn included.

    ``template`` None is the tokenizer's own, and ChatML where it has none. Turns are what the template marks with
    ``{% generation %}``; without marks, what a message adds to the prompt before it. Raises ValueError for a
    conversation that cannot be used, ConfigError for a template or tokenizer that cannot.
    """
    check(messages)
    return _encoder(tokenizer, template).encode(messages)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None) -> list[int]:
    """Tokens of a conversation up to where the assistant is to write. Templates and errors as ``encode_chat``."""
    check(messages, assistant=False)
    return _encoder(tokenizer, template).prompt(messages)


def turn_end(tokenizer: Tokenizer, template: str | None = None) -> int | None:
    """The special token that ends a turn of the assistant's; None where the template writes none."""
    tokens, own = encode_chat(
        tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], template
    )
    last = int(tokens[own][-1])
    return last if last in tokenizer.special.values() else None


def check(messages: object, assistant: bool = True) -> None:
    """Raises ValueError, in one line, for what is no conversation (with a turn of the assistant's)."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages: not a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{number}]: {type(message).__name__} instead of an object with role and content")
        if "role" not in message:
            raise ValueError(f"messages[{number}]: no role")
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{number}].role={message['role']!r} is none of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{number}].content: {type(message.get('content')).__name__} instead of a string")
    if assistant and not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages: no message of the assistant, nothing to learn from")


@lru_cache(maxsize=8)
def _encoder(tokenizer: Tokenizer, template: str | None) -> _Encoder:
    return _Encoder(tokenizer, template)


class _Encoder:
    """A tokenizer with a template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None) -> None:
        source = template or tokenizer.chat_template or CHATML
        if source == CHATML and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
            raise ConfigError(
                f"data.tokenizer={tokenizer.name} has no chat_template, and not the special tokens <|im_start|> and "
                "<|im_end|> of the built-in one: put a tokenizer_config.json with a chat_template beside it"
            )
        written = frozenset(text for text in tokenizer.added if text.strip() and text in source)
        self.template = _Template(source)
        self.own = _pattern(tokenizer.special)  # not even the assistant's text makes these
        self.tokenizer = tokenizer.with_special(written)
        self.controls = _pattern(self.tokenizer.special)
        self.variables = tokenizer.named

    def encode(self, messages: Sequence[Message]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """As ``encode_chat``."""
        encoded = self._encode(messages, False)
        tokens = [np.array(span, np.uint32) for span in encoded]
        loss = [np.full(len(span), at % 2 == 1) for at, span in enumerate(encoded)]
        return np.concatenate(tokens), np.concatenate(loss)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """As ``encode_prompt``; turns of the assistant's are cut into tokens as they were in training, where
        the template tells them from the rest."""
        return [token for span in self._encode(messages, True) for token in span]

    def _encode(self, messages: Sequence[Message], prompt: bool) -> list[list[int]]:
        """Tokens of the rendered text in spans, every other one the assistant's."""
        wedge = "".join(secrets.choice("0123456789") for _ in range(24))  # survives upper, trim and tojson
        wedged = [self._wedged(message, wedge) for message in messages]
        try:
            rendered = self.template.spans(wedged, self.variables, prompt)
        except ConfigError:  # what the assistant wrote is not known
            if not prompt:
                raise
            rendered = [self.template.render(wedged, True, self.variables)]
        if wedged != list(messages):
            plain = self.template.render(messages, prompt, self.variables)
            if "".join(rendered).replace(wedge, "") != plain:
                raise ValueError("messages: a content spells a special token, and the template acts on it")
        spans = [self._parts(text, wedge) for text in _ended(rendered, self.controls)]
        return self.tokenizer.encode_spans(spans)

    def _wedged(self, message: Message, wedge: str) -> Message:
        spelled = self.own if message["role"] == "assistant" else self.controls
        return {key: value if key == "role" else _broken(value, spelled, wedge) for key, value in message.items()}

    def _parts(self, text: str, wedge: str) -> list[Part]:
        parts: list[Part] = []
        for at, part in enumerate(self.controls.split(text)):  # text, special token, text, …
            parts.append(self.tokenizer.special[part] if at % 2 else part.replace(wedge, ""))
        return parts


class _Template:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateSyntaxError

        self.marks = re.search(r"{%-?\s*generation\b", source) is not None
        self.mark = secrets.token_hex(12)
        try:
            self.compiled = _environment(self.mark).from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat_template, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], prompt: bool, variables: dict[str, Any]) -> str:
        """The text. Raises ValueError for messages that the template refuses."""
        return self._render(messages, prompt, variables).replace(self.mark, "")

    def spans(self, messages: Sequence[Message], variables: dict[str, Any], prompt: bool = False) -> list[str]:
        """The text in pieces, every other one the assistant's; with ``prompt`` up to where its next one begins."""
        text = self._render(messages, prompt, variables)
        if self.marks:
            pieces = text.split(self.mark)
            if len(pieces) == 1 and any(message["role"] == "assistant" for message in messages):
                raise ConfigError(
                    "chat_template: its {% generation %} marks nothing of a conversation with an assistant"
                )
            return pieces
        pieces, done = [], 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:number], True, variables)
                after = self._render(messages[: number + 1], False, variables)
                if not (after.startswith(before) and text.startswith(after) and done <= len(before)):
                    raise ConfigError(
                        f"chat_template: the text up to messages[{number}] is not how the whole text begins, so that "
                        "what the assistant wrote is not known: mark it with {% generation %} … {% endgeneration %}"
                    )
                pieces += [text[done : len(before)], text[len(before) : len(after)]]
                done = len(after)
        return [*pieces, text[done:]]

    def _render(self, messages: Sequence[Message], prompt: bool, variables: dict[str, Any]) -> str:
        from jinja2 import TemplateError

        try:
            return self.compiled.render(messages=list(messages), add_generation_prompt=prompt, **variables)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"messages: the chat template refuses them: {told}") from error


def _environment(mark: str) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up. There is no ``strftime_now``: a data set must not depend on the day."""
    import json

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: what the assistant writes stands between two marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for _ in range(2)]
            return nodes.Scope([marks[0], *body, marks[1]], lineno=line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment


def _pattern(spellings: dict[str, int]) -> re.Pattern[str]:
    """Any of these, the longest first; nothing where there are none."""
    longest = sorted(spellings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest))})" if longest else r"((?!))")


def _broken(value: Any, spelled: re.Pattern[str], wedge: str) -> Any:
    """``value`` with a wedge after the first character of everything that spells a special token."""
    if isinstance(value, str):
        for _ in range(OVERLAPS):
            value, count = spelled.subn(lambda match: match[0][0] + wedge + match[0][1:], value)
            if not count:
                return value
        raise ValueError("messages: a content spells special tokens within each other")
    if isinstance(value, dict):
        return {_broken(key, spelled, wedge): _broken(item, spelled, wedge) for key, item in value.items()}
    if isinstance(value, list):
        return [_broken(item, spelled, wedge) for item in value]
    return value


def _ended(pieces: list[str], controls: re.Pattern[str]) -> list[str]:
    """The pieces, where blanks after the token that ends a turn are not the assistant's: nobody generates them."""
    moved = list(pieces)
    for at in range(1, len(moved), 2):
        kept = moved[at].rstrip()
        ends = [match.end() for match in controls.finditer(kept)]
        if ends and ends[-1] == len(kept):
            moved[at + 1] = moved[at][len(kept) :] + moved[at + 1]
            moved[at] = kept
    return moved
