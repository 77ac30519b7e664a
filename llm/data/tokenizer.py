"""Tokenizers. Bytes are enough for small models, need no files and can spell anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    sha256: str  # of what decides which ids a text has
    vocab_size: int
    end: int | None  # what ends a document

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """One token per UTF-8 byte."""

    name = "bytes"
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    vocab_size = 256
    end: int | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``; bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names."""
    if name == "bytes":
        return ByteTokenizer()
    raise ValueError(f"data.tokenizer={name} is unknown: only 'bytes' exists")
