"""Which documents are left out, and why."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import msgspec

from llm.data.prepare.records import Row
from llm.utils.config import PrepareConfig

LETTERS = re.compile(r"[^\W\d_]+")
DIGEST = 16  # bytes


class Filters:
    """Asks a row for the reason to leave it out."""

    def __init__(self, config: PrepareConfig) -> None:
        self.min_chars, self.max_chars, self.min_alpha = config.min_chars, config.max_chars, config.min_alpha
        self.drop = re.compile(config.drop) if config.drop is not None else None
        wanted: dict[str, set[str]] = {}
        for each in config.keep:
            field, _, value = each.partition("=")
            wanted.setdefault(field, set()).add(value)
        self.wanted = list(wanted.items())

    def reason(self, row: Row, text: str) -> str | None:
        """Why ``row``, whose text this is, is left out; None if it is not."""
        for (field, values), value in zip(self.wanted, row.values, strict=True):
            if _spelt(value) not in values:
                return f"keep {field}"
        if len(text) < self.min_chars:
            return "min_chars"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "max_chars"
        if self.min_alpha and len(text) - len(LETTERS.sub("", text)) < self.min_alpha * len(text):
            return "min_alpha"
        if self.drop is not None and self.drop.search(text):
            return "drop"
        return None


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def spell_chat(messages: list[Any]) -> str:
    """All that is said in a chat, for filters and for a tokenizer that is trained."""
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    return "\n".join(each for each in contents if isinstance(each, str))


def content_bytes(content: Any) -> bytes:
    """What makes two documents the same."""
    if isinstance(content, str):
        return content.encode()
    return msgspec.json.encode(content, order="sorted", enc_hook=str)


def hasher(seed: int) -> Callable[[bytes], bytes]:
    """A hash of documents of DIGEST bytes: its first half chooses the split, all of it finds duplicates."""
    start = hashlib.blake2b(digest_size=DIGEST, key=seed.to_bytes(16, "little"))

    def digest(data: bytes) -> bytes:
        each = start.copy()
        each.update(data)
        return each.digest()

    return digest


def is_validation(digest: bytes, share: float) -> bool:
    """Does the document belong to the validation split?"""
    return int.from_bytes(digest[:8], "little") < share * 2.0**64
