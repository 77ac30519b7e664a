"""tiktoken's files of ranks: lines of a token's bytes in base64, and its id, which is also the order of merging.

The file has neither the pattern that splits a text nor special tokens: these are known here by the encoding's name.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from llm.data import words
from llm.data.tokenizer import Part, Tokenizer, well_formed
from llm.utils.config import ConfigError

HEADER = b"# encoding "  # the first line of a copy


@dataclass(frozen=True)
class Encoding:
    """What goes with a file of ranks."""

    pattern: str
    special: dict[str, int]
    end: str
    after_ranks: bool = False  # ids of special tokens count from the end of the ranks


def _llama3() -> dict[str, int]:
    """Llama 3.1's 256 special tokens."""
    first = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    first += [
        "finetune_right_pad_id",
        "reserved_special_token_2",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
    ]
    first += ["python_tag"]
    names = first + [f"reserved_special_token_{number}" for number in range(3, 256 - len(first) + 3)]
    return {f"<|{name}|>": at for at, name in enumerate(names)}


_GPT2 = Encoding(words.GPT2, {"<|endoftext|>": 50256}, "<|endoftext|>")
_CL100K = {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "cl100k_base": Encoding(words.LLAMA3, {**_CL100K, "<|endofprompt|>": 100276}, "<|endoftext|>"),
    "o200k_base": Encoding(words.O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, "<|endoftext|>"),
    "llama3": Encoding(words.LLAMA3, _llama3(), "<|end_of_text|>", after_ranks=True),
}


def load_ranks(name: str, file: str, data: bytes) -> RanksTokenizer:
    """The tokenizer of a file of this name and content. Raises ConfigError."""
    said = name.partition("#")[2] or PurePosixPath(file).name.partition(".")[0]
    if data.startswith(HEADER):
        line, _, data = data.partition(b"\n")
        said = line.removeprefix(HEADER).decode(errors="replace").strip()
    ranks = _ranks(name, data)
    if said not in ENCODINGS:
        raise ConfigError(
            f"data.tokenizer={name}: which encoding is it? Call the file NAME.tiktoken or add #NAME, with a NAME of "
            + ", ".join(ENCODINGS)
        )
    return RanksTokenizer(name, said, data, ranks)


class RanksTokenizer:
    """A tokenizer of tiktoken."""

    added: frozenset[str] = frozenset()
    chat_template: str | None = None

    def __init__(self, name: str, encoding: str, data: bytes, ranks: dict[bytes, int]) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(
                f"data.tokenizer={name} needs the package tiktoken: pip install 'llmops[data]'"
            ) from error
        known = ENCODINGS[encoding]
        self.name = name
        self.pattern = known.pattern  # by which texts fall into words
        self._data, self._encoding = data, encoding
        largest = max(ranks.values())
        first = largest + 1 if known.after_ranks else 0
        self.special = {text: first + token for text, token in known.special.items()}
        self._tokens = {*ranks.values(), *self.special.values()}
        if len(self._tokens) < len(ranks) + len(self.special):
            raise ConfigError(
                f"data.tokenizer={name}: the file has ranks up to {largest}, and among them the ids of {encoding}'s "
                "special tokens: is it another encoding's?"
            )
        identity = json.dumps([known.pattern, self.special], sort_keys=True).encode()
        self.sha256 = hashlib.sha256(identity + b"\n" + data).hexdigest()
        self.vocab_size = max(largest, *self.special.values()) + 1
        self.end: int | None = self.special[known.end]
        self.named = {"eos_token": known.end}
        try:
            self._library = tiktoken.Encoding(
                encoding, pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=self.special
            )
        except ValueError as error:
            raise ConfigError(f"data.tokenizer={name}: tiktoken refuses it: {error}") from error
        self._words = words.Words(known.pattern, self._library._encode_single_piece)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text."""
        ids: list[int] = self._array(text).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, on one thread."""
        return [self._array(text) for text in texts]

    def encode_spans(self, spans: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Ids of each span."""
        return [
            [token for part in span for token in ([part] if isinstance(part, int) else self.encode(part))]
            for span in spans
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``."""
        return self._library.decode([token for token in tokens if token in self._tokens])

    def with_special(self, spellings: frozenset[str]) -> Tokenizer:
        """Itself: all added tokens are special."""
        return self

    def file(self) -> bytes:
        """The ranks, and a first line that names the encoding."""
        return HEADER + self._encoding.encode() + b"\n" + self._data

    def ranks(self) -> dict[bytes, int]:
        """The id of each token that is not special, which is also when it is merged."""
        return _ranks(self.name, self._data)

    def _array(self, text: str) -> NDArray[np.uint32]:
        found = self._words.ids(text)
        if found is not None:
            return found
        try:
            return np.array(self._library.encode_ordinary(well_formed(text)), np.uint32)
        except BaseException as error:  # its regular expressions overflow on a million spaces, and it panics
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tiktoken cannot split a text of {len(text)} characters: {error}") from None


def _ranks(name: str, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ConfigError(
                f"data.tokenizer={name}: line {number} is no 'base64 rank' of tiktoken, and the file no tokenizer.json"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ConfigError(f"data.tokenizer={name}: not a tiktoken file: no rank for the byte 0x{missing[0]:02x}")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ConfigError(f"data.tokenizer={name}: a rank is negative, or given to two tokens")
    return ranks
