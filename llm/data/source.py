"""The sources that a run may read: text, one token per byte, and datasets that ``llm.tools.prepare_data`` has made.

A source has samples, which are rows of T + 1 tokens: T positions and, for the last of them, its target. Samples of
tokens that lie end to end share one token, so that each is a target once; the last sample is filled up.
"""

from __future__ import annotations

import gzip
import mmap
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llm.data.blocks import Blocks
from llm.data.cache import ShardCache, cache_folder
from llm.data.format import BLOCK, Index, Shard, TokenizerRecord, read_index
from llm.data.precheck import EMBEDDED
from llm.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from llm.utils.config import ConfigError, DataConfig
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage, open_storage

TRAIN, VALIDATION = "train", "validation"
BYTES = TokenizerRecord(name=ByteTokenizer.name, sha256=ByteTokenizer.sha256, vocab_size=256, end=None)


class Row(NamedTuple):
    """A sample: ``tokens`` (T + 1), ``starts`` of documents (T + 1; None: there are none), and which targets count (T;
    None: all)."""

    tokens: NDArray[Any]
    starts: NDArray[np.bool_] | None
    counted: NDArray[np.bool_] | None


class Source(Protocol):
    """Samples of one length. Safe to use in threads."""

    size: int  # samples, which is an epoch
    tokens: int
    has_documents: bool

    @property
    def near(self) -> bool:
        """Does reading a sample take microseconds, not the round trip to a store? Copies change that."""

    def row(self, index: int) -> Row:
        """Sample ``index``. Raises DataError or OSError."""


class ByteSource:
    """Windows over a text."""

    near, has_documents = True, False

    def __init__(self, text: memoryview, seq_len: int) -> None:
        self._text = np.frombuffer(text, np.uint8)
        self._seq_len = seq_len
        self.tokens = len(text)
        self.size = windows(self.tokens, seq_len)

    def row(self, index: int) -> Row:
        begin = index * self._seq_len
        return filled(self._text[begin : begin + self._seq_len + 1], None, None, self._seq_len)


class TokenSource:
    """A split of a dataset: windows over its tokens, or its packed rows."""

    has_documents = True

    def __init__(self, blocks: Blocks, shards: list[Shard], seq_len: int) -> None:
        self._blocks, self._shards, self._seq_len = blocks, shards, seq_len
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self.tokens = self._ends[-1] if shards else 0
        self._packed = blocks.index.row is not None
        self._step = seq_len + 1 if self._packed else seq_len
        self.size = self.tokens // self._step if self._packed else windows(self.tokens, seq_len)

    @property
    def near(self) -> bool:
        return self._blocks.near

    def row(self, index: int) -> Row:
        begin = index * self._step
        end = min(begin + self._seq_len + 1, self.tokens)
        number = bisect_right(self._ends, begin)
        tokens, starts, loss = self._part(number, begin, min(end, self._ends[number]))
        while self._ends[number] < end:  # goes on in the next shard
            number += 1
            more = self._part(number, self._ends[number - 1], min(end, self._ends[number]))
            tokens, starts = np.append(tokens, more[0]), np.append(starts, more[1])
            loss = None if loss is None or more[2] is None else np.append(loss, more[2])
        return filled(tokens, starts, loss, self._seq_len)

    def _part(
        self, number: int, begin: int, end: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        """Tokens, starts and loss from ``begin`` to ``end`` of the split, which shard ``number`` has."""
        shard = self._shards[number]
        first = self._ends[number] - shard.tokens
        block = (begin - first) // BLOCK
        records = self._blocks.read(shard, block, -(-(end - first) // BLOCK) - block)
        first += block * BLOCK
        a, b = begin - first, end - first
        loss = _bits(records["loss"], a, b) if self._blocks.index.loss else None
        return _range(records["tokens"], a, b), _bits(records["starts"], a, b), loss


@dataclass(frozen=True)
class Opened:
    """A source's two splits, where it lies, and what names its content."""

    train: Source
    validation: Source
    fingerprint: str
    tokenizer: TokenizerRecord
    storage: Storage | None = None  # of a dataset
    cache: ShardCache | None = None


def open_source(key: str, place: str, config: DataConfig, seq_len: int) -> Opened:
    """Open ``place``, which ``key`` of the config names: ``embedded:NAME``, a dataset, or a file of text.

    Raises ConfigError when there is nothing, or nothing to train on.
    """
    if not place.startswith(EMBEDDED):
        storage = open_storage(place)
        index = read_index(storage)
        if index is not None:
            return _dataset(key, place, storage, index, config, seq_len)
    data = text_bytes(key, place)
    cut = len(data) - int(len(data) * config.validation_fraction)
    train, held_out = ByteSource(data[:cut], seq_len), ByteSource(data[cut:], seq_len)
    if not train.size:
        raise ConfigError(
            f"{key}={place} has {cut} bytes to train on: give more text, or lower data.validation_fraction"
        )
    fingerprint = f"{len(data)}-{zlib.crc32(data):08x}-{config.validation_fraction:g}"
    return Opened(train, held_out, fingerprint, BYTES)


def _dataset(key: str, place: str, storage: Storage, index: Index, config: DataConfig, seq_len: int) -> Opened:
    check_dataset(key, place, index, seq_len)
    shards = index.splits.get(TRAIN, [])
    cache = None
    if not isinstance(storage, LocalStorage) and (folder := cache_folder(config)) is not None:
        cache = ShardCache(folder, int(config.cache_gb * 1e9), storage, index, shards)
    blocks = Blocks(storage, index, cache)
    train = TokenSource(blocks, shards, seq_len)
    validation = TokenSource(blocks, index.splits.get(VALIDATION, []), seq_len)
    return Opened(train, validation, index.fingerprint(), index.tokenizer, storage, cache)


def recorded_tokenizer(record: TokenizerRecord, folder: str | None) -> Tokenizer:
    """The tokenizer that made a dataset; ``folder`` has its file, if it has one.

    Raises ConfigError where it is missing, or is another one.
    """
    found = load_tokenizer(record.name if record.file is None else f"{folder}/{record.file}")
    if found.sha256 != record.sha256:
        raise ConfigError(
            f"{found.name} is not the tokenizer that made the data (SHA-256 {record.sha256[:12]}…): restore it"
        )
    return found


def check_dataset(key: str, place: str, index: Index, seq_len: int) -> None:
    """Raise ConfigError where a dataset cannot be read in rows of ``seq_len`` positions."""
    if not index.tokens(TRAIN):
        raise ConfigError(f"{key}={place} has no tokens to train on: its index lists none in the split train")
    if index.row is not None and index.row != seq_len + 1:
        raise ConfigError(
            f"train.seq_len={seq_len}, but {key}={place} was packed for sequences of {index.row - 1}: "
            f"set train.seq_len={index.row - 1}, or prepare it with --pack {seq_len}"
        )


def windows(tokens: int, seq_len: int) -> int:
    """Samples of so many tokens that lie end to end: one for every ``seq_len`` targets that they have."""
    return max(0, -(-(tokens - 1) // seq_len))


def filled(tokens: NDArray[Any], starts: NDArray[np.bool_] | None, loss: NDArray[np.bool_] | None, seq_len: int) -> Row:
    """A row of ``seq_len`` + 1: what is missing at its end is a document of its own that does not count.

    The first token of a document is not to be learnt from the one before it.
    """
    missing = seq_len + 1 - len(tokens)
    counted = None if loss is None else loss[1:]
    if starts is not None:
        counted = ~starts[1:] if counted is None else counted & ~starts[1:]
    if missing:
        counted = np.ones(len(tokens) - 1, bool) if counted is None else counted
        counted = np.append(counted, np.zeros(missing, bool))
        tokens = np.append(tokens, np.zeros(missing, tokens.dtype))
        if starts is not None:
            starts = np.append(starts, np.arange(missing) == 0)
    return Row(tokens, starts, counted)


def _range(records: NDArray[Any], begin: int, end: int) -> NDArray[Any]:
    """Elements ``begin`` to ``end`` of records (B, N) end to end."""
    size = records.shape[1]
    if end <= size:
        return records[0, begin:end]
    if end <= 2 * size:  # no more is copied than is wanted
        return np.concatenate((records[0, begin:], records[1, : end - size]))
    return records.reshape(-1)[begin:end]


def _bits(packed: NDArray[np.uint8], begin: int, end: int) -> NDArray[np.bool_]:
    """Bits ``begin`` to ``end`` of rows of packed ones that follow each other."""
    first = begin // 8
    bits = np.unpackbits(_range(packed, first, -(-end // 8)), bitorder="little")
    return bits[begin - first * 8 : end - first * 8].view(np.bool_)


def text_bytes(key: str, place: str) -> memoryview:
    """The bytes of a text; those of a local file are mapped, not read."""
    if place.startswith(EMBEDDED):
        file = resources.files("llm.data") / "corpus" / f"{place.removeprefix(EMBEDDED)}.txt.gz"
        if not file.is_file():
            raise ConfigError(f"{key}={place}: this package embeds only embedded:shakespeare")
        return memoryview(gzip.decompress(file.read_bytes()))
    if "://" in place:
        import fsspec

        try:
            with fsspec.open(place, "rb") as stream:  # type: ignore[no-untyped-call]
                return memoryview(stream.read())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{key}={place}: there is no such object, and no dataset (a folder with index.json)"
            ) from error
    path = Path(place)
    if path.is_dir():
        raise ConfigError(
            f"{key}={place} is a folder without index.json: finish preparing it (python -m llm.tools.prepare_data), "
            "or name a file of text"
        )
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(f"{key}={place}: no such file, or it is empty")
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
