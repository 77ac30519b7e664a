"""Tokenizers: bytes, which need no file and can spell anything, and files of Hugging Face tokenizers and tiktoken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from llm.utils.config import ConfigError
from llm.utils.storage import Storage, open_storage

JSON_FILE = "tokenizer.json"
RANKS_SUFFIX = ".tiktoken"
BESIDE = ("tokenizer_config.json", "chat_template.jinja")
Part = str | int  # of a chat: ordinary text, or the id of a special token


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str  # what it was loaded from, as the user wrote it
    sha256: str  # of what decides the ids: the same wherever the file lies
    vocab_size: int  # 1 + the largest id that it can give
    end: int | None  # the token that ends a document, where there is one
    special: dict[str, int]  # spelling -> id of the tokens that no text makes
    added: frozenset[str]  # spellings that are one token each, and still ordinary text
    named: dict[str, str]  # what a chat template may ask for: bos_token, eos_token, … -> spelling
    chat_template: str | None  # its own, in Jinja

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: what spells a special token is text like any other. Lone surrogates are U+FFFD."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of many texts, as ``encode`` gives them. The arrays may be read-only."""

    def encode_spans(self, spans: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Ids of spans that follow each other in one text, each encoded as if the text began or ended there.

        Raises ConfigError for a tokenizer that cannot: one that changes a text which begins in the middle.
        """

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``, special tokens spelled out; ids that there are not are left out."""

    def with_special(self, spellings: frozenset[str]) -> Tokenizer:
        """The same, for which also these added tokens are special."""

    def __hash__(self) -> int: ...


class ByteTokenizer:
    """One token per UTF-8 byte."""

    name = "bytes"
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    vocab_size = 256
    end: int | None = None
    added: frozenset[str] = frozenset()
    chat_template: str | None = None

    def __init__(self) -> None:
        self.special: dict[str, int] = {}
        self.named: dict[str, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return list(well_formed(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text."""
        return [np.frombuffer(well_formed(text).encode(), np.uint8).astype(np.uint32) for text in texts]

    def encode_spans(self, spans: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Token ids of each span; there are no special tokens."""
        return [self.encode("".join(map(str, span))) for span in spans]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``; bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def with_special(self, spellings: frozenset[str]) -> Tokenizer:
        """Itself: it has no added tokens."""
        return self


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``name`` says; nothing is downloaded from a hub.

    ``bytes``; a path or fsspec URL of a ``tokenizer.json``, or of a folder that holds one; of a tiktoken file of ranks,
    whose encoding is said by the file's name (``cl100k_base.tiktoken``), or after ``#`` (``tokenizer.model#llama3``),
    or by the first line of the copy that ``tokenizer_file`` made. Raises ConfigError.
    """
    if name == "bytes":
        return ByteTokenizer()
    folder, file, data = _read(name)
    if data.lstrip()[:1] != b"{":
        from llm.data.tokenizer_tiktoken import load_ranks

        return load_ranks(name, file, data)
    from llm.data.tokenizer_json import load_json

    return load_json(name, data, {beside: _optional(folder, beside) for beside in BESIDE})


def tokenizer_file(tokenizer: Tokenizer) -> bytes | None:
    """A file that alone, under any name, loads as the same tokenizer; None for bytes, which need none."""
    from llm.data.tokenizer_json import JsonTokenizer
    from llm.data.tokenizer_tiktoken import RanksTokenizer

    return tokenizer.file() if isinstance(tokenizer, JsonTokenizer | RanksTokenizer) else None


def well_formed(text: str) -> str:
    """``text`` as UTF-8 can have it: U+FFFD for surrogates, which JSON can spell alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read(name: str) -> tuple[Storage, str, bytes]:
    """Folder, name and content of the file that is meant."""
    place = name.partition("#")[0].rstrip("/")
    url, _, file = place.rpartition("/")
    if "://" in place and not urlsplit(place).path.strip("/"):
        url, file = place, ""  # a bucket
    try:
        if file:
            storage = open_storage(url or ("/" if place.startswith("/") else "."))
            try:
                return storage, file, storage.read(file)
            except (FileNotFoundError, IsADirectoryError):
                pass
        storage = open_storage(place)
        names = storage.list("")
        ranks = [found for found in names if found.endswith(RANKS_SUFFIX)]
        if JSON_FILE in names or len(ranks) == 1:
            file = JSON_FILE if JSON_FILE in names else ranks[0]
            return storage, file, storage.read(file)
    except (OSError, ValueError, ImportError) as error:  # of fsspec: an unknown protocol, or its package
        raise ConfigError(f"data.tokenizer={name}: cannot be read: {error}") from error
    raise ConfigError(
        f"data.tokenizer={name}: there is no such file, nor a folder with a {JSON_FILE}; give 'bytes', or the path or "
        f"URL of a {JSON_FILE}, its folder, or a tiktoken file of ranks (nothing is downloaded from a hub)"
    )


def _optional(storage: Storage, file: str) -> bytes | None:
    try:
        return storage.read(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{storage.url}/{file} cannot be read: {error}") from error
