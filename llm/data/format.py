"""Datasets of tokens on disk: a folder, on a path or any fsspec URL, whose ``index.json`` is written last.

A shard is a file of equal records without a header, one for each block of 8,192 tokens, the last one filled up with
zeros; ``numpy.memmap(file, dtype=record(index))`` maps it. A record has

- ``tokens``: uint16 or uint32, little-endian;
- ``starts``: a bit for each token, least significant first: set where a document begins;
- ``loss``, where the index says so: a bit for each token: set where it is to be learnt. Padding never is;
- ``check``: the CRC-32C of these, mixed with the number of the block and the digest of the whole shard, which is in
  the index. So a range of a few kilobytes can be read alone and trusted: damage, a block in the wrong place and a shard
  that another preparation has written in the meantime are all found.

A split is its shards end to end. Free of torch.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from crc32c import crc32c
from msgspec import Meta
from numpy.typing import NDArray

from llm.utils.config import ConfigError
from llm.utils.storage import Storage

INDEX = "index.json"
BLOCK = 1 << 13  # tokens
SHARD_TOKENS = 1536 * BLOCK  # of the largest shard, 12.6 million: stores take it in one request
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Word = Literal["uint16", "uint32"]


class DataError(Exception):
    """A dataset that cannot be read as its index says. One line: which file, where, what."""


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file: its name in the folder, and the CRC-32C of the CRC-32Cs of all its blocks."""

    name: str
    tokens: Positive
    documents: Count
    digest: Annotated[int, Meta(ge=0, lt=2**32)]


class TokenizerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What made the tokens. ``file`` lies beside the index; ``bytes`` needs none. ``end`` follows every document."""

    name: str
    sha256: str
    vocab_size: Positive
    end: int | None
    file: str | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``index.json``. ``row``: tokens of a packed row, one more than its positions; None: documents lie end to end.

    ``made_from`` tells where the dataset came from, and ``report`` what was found there; neither decides any token.
    """

    format: Literal[1] = 1
    dtype: Word
    tokenizer: TokenizerRecord
    row: Annotated[int, Meta(ge=2)] | None
    loss: bool
    splits: dict[str, list[Shard]]
    made_from: dict[str, Any] = {}
    report: dict[str, Any] = {}

    def tokens(self, split: str) -> int:
        """In all shards of ``split``; 0 where there is none."""
        return sum(shard.tokens for shard in self.splits.get(split, []))

    def fingerprint(self) -> str:
        """Names exactly these tokens, in this order, wherever they lie."""
        parts = [self.dtype, self.tokenizer.sha256, self.row, self.loss, self.splits]
        return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:32]


def read_index(storage: Storage) -> Index | None:
    """The index of the dataset at ``storage``; None where there is none. Raises ConfigError for a damaged one."""
    try:
        text = storage.read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(text, type=Index)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{storage.url}/{INDEX} is no index of tokens that this version reads: {error}") from error


def write_index(storage: Storage, index: Index) -> None:
    """Write ``index.json``: from now on the dataset exists."""
    storage.replace(INDEX, msgspec.json.format(msgspec.json.encode(index, order="sorted"), indent=1))


def token_type(vocab_size: int) -> Word:
    """The narrowest type for tokens below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@functools.cache
def record(dtype: Word, loss: bool) -> np.dtype[Any]:
    """How a block lies in its file."""
    bits = [("starts", "u1", (BLOCK // 8,)), *([("loss", "u1", (BLOCK // 8,))] if loss else [])]
    return np.dtype([("tokens", np.dtype(dtype).newbyteorder("<"), (BLOCK,)), *bits, ("check", "<u4")])


def blocks_of(tokens: int) -> int:
    """Records of a shard with so many tokens."""
    return -(-tokens // BLOCK)


def seal(digest: int, block: int) -> int:
    """What the checksum of a block of the shard with this digest is mixed with, by exclusive or."""
    return (digest + block) * 0x9E3779B97F4A7C15 >> 32 & 0xFFFFFFFF


@dataclass
class ShardWriter:
    """Writes tokens as shards ``PREFIX-000.tokens``, ``PREFIX-001.tokens``, … into ``storage``.

    Documents may go on in the next shard; rows of packed ones do not.
    """

    storage: Storage
    prefix: str
    dtype: Word
    row: int | None = None
    loss: bool = False
    shards: list[Shard] = field(default_factory=list)
    _pending: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    _count: int = 0

    @property
    def most(self) -> int:
        """Tokens of a full shard."""
        return SHARD_TOKENS - SHARD_TOKENS % (self.row or 1)

    def add(self, tokens: NDArray[Any], starts: NDArray[np.bool_], loss: NDArray[np.bool_] | None = None) -> None:
        """Append tokens (N), where documents begin (N), and with ``self.loss`` which are to be learnt (N).

        Packed ones: whole rows.
        """
        parts = (tokens, starts) if loss is None else (tokens, starts, loss)
        assert (loss is not None) == self.loss
        at = 0
        while at < len(tokens):
            end = min(len(tokens), at + self.most - self._count)
            self._pending.append(tuple(part[at:end] for part in parts))
            self._count += end - at
            at = end
            if self._count == self.most:
                self._flush()

    def close(self) -> list[Shard]:
        """Write the last shard; returns all of them."""
        if self._count:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        records = np.zeros(blocks_of(self._count), record(self.dtype, self.loss))
        parts = [np.concatenate(part) for part in zip(*self._pending, strict=True)]
        for name, part in zip(("tokens", "starts", "loss"), parts, strict=False):
            if name == "tokens":
                padded = np.zeros(len(records) * BLOCK, records["tokens"].dtype)
                padded[: self._count] = part
            else:
                padded = np.zeros(len(records) * BLOCK // 8, np.uint8)
                bits = np.packbits(part, bitorder="little")
                padded[: len(bits)] = bits
            records[name] = padded.reshape(len(records), -1)
        sums = checksums(records.tobytes(), records.itemsize)
        digest = crc32c(np.array(sums, "<u4").tobytes())
        records["check"] = [each ^ seal(digest, block) for block, each in enumerate(sums)]
        name = f"{self.prefix}-{len(self.shards):03}.tokens"
        self.storage.replace(name, records.tobytes())
        documents = int(np.count_nonzero(parts[1]))
        self.shards.append(Shard(name=name, tokens=self._count, documents=documents, digest=digest))
        self._pending, self._count = [], 0


def checksums(data: bytes | memoryview, size: int) -> list[int]:
    """The CRC-32C of what stands before ``check`` in each record of ``size`` bytes."""
    data = memoryview(data)
    return [crc32c(data[end - size : end - 4]) for end in range(size, len(data) + 1, size)]


def verified(data: bytes | memoryview, index: Index, shard: Shard, first: int, where: str) -> NDArray[Any]:
    """``data``, read from a shard's block ``first`` on, as records. Raises DataError: where it is, what is wrong."""
    kind = record(index.dtype, index.loss)
    if len(data) % kind.itemsize or not len(data):
        raise DataError(f"{where} is cut off: block {first + len(data) // kind.itemsize} is not whole; prepare it anew")
    records = np.frombuffer(data, kind)
    # A sample reads one block or two: numbers of Python's own take a tenth of the time of small arrays.
    kept = records["check"].tolist()
    for block, made in enumerate(checksums(data, kind.itemsize), first):
        if kept[block - first] != made ^ seal(shard.digest, block):
            raise DataError(
                f"{where}: block {block} is damaged, or the file was written anew after its index: "
                "prepare the dataset anew, or copy it again"
            )
    return records
