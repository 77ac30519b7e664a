"""A unit of work: its documents become tokens, in shards of its own, and then a record that it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from llm.data.format import ShardWriter, Word, token_type
from llm.data.packing import pack
from llm.data.prepare.filters import Filters, content_bytes, hasher, is_validation, spell_chat
from llm.data.prepare.found import Part, add
from llm.data.prepare.plan import PARTS, Plan
from llm.data.prepare.records import Bad, Row, Rows
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.utils.config import ConfigError, PrepareConfig
from llm.utils.storage import Storage, open_storage

SPLITS = ("train", "validation")
TRAINED = "tokenizer.json"  # what --train-tokenizer makes
BATCH_DOCUMENTS, BATCH_CHARS = 512, 1 << 20  # that the tokenizer gets at a time
PACK_TOKENS = 1 << 24  # among which documents for a row are looked for
Progress = Callable[[int, int], None]  # is told of bytes of input and of tokens


def load(name: str) -> Tokenizer:
    """The tokenizer that ``prepare.tokenizer`` names. Raises ConfigError."""
    try:
        return load_tokenizer(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.tokenizer=", "prepare.tokenizer=", 1)) from error


@dataclass(slots=True)
class Document:
    """What is to become tokens."""

    row: Row
    text: str
    data: bytes
    digest: bytes
    line: int
    piece: int


@dataclass
class Job:
    """What a process needs to do any item of any stage."""

    config: PrepareConfig
    plan: Plan
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = self.plan.digest()

    @cached_property
    def storage(self) -> Storage:
        """Where the dataset is made."""
        return open_storage(str(self.config.output))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That makes the tokens."""
        # One thread in each of many processes: together they use the machine.
        os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        trained = self.config.train_tokenizer is not None
        return load(f"{self.storage.url}/{TRAINED}" if trained else self.config.tokenizer)

    @cached_property
    def dtype(self) -> Word:
        """Of the tokens. Raises ConfigError when the vocabulary does not fit into the one that is asked for."""
        needed = token_type(self.tokenizer.vocab_size)
        if self.config.dtype == "auto":
            return needed
        if (self.config.dtype, needed) == ("uint16", "uint32"):
            raise ConfigError(
                f"prepare.dtype=uint16 is too narrow for the {self.tokenizer.vocab_size} tokens of "
                f"prepare.tokenizer={self.config.tokenizer}: set auto"
            )
        return self.config.dtype

    @property
    def row(self) -> int | None:
        """Tokens of a packed row."""
        return self.config.pack + 1 if self.config.pack is not None else None

    @property
    def loss(self) -> bool:
        """Is it written which tokens are to be learnt?"""
        return self.config.chat or self.row is not None

    def documents(self, unit: int, part: Part, progress: Progress) -> Iterator[Document]:
        """Documents of a unit that filters let through, in order. ``part`` counts all others."""
        rows, filters, digest = Rows(self.config), Filters(self.config), hasher(self.config.seed)
        for index, piece in enumerate(self.plan.units[unit]):
            for counts in (part.lines, part.records, part.bad):
                counts.append(0)
            file = self.plan.files[piece.file]
            for line, row in rows.of(file, piece, lambda read: progress(read, 0)):
                part.records[index] += 1
                if isinstance(row, Bad):
                    part.miss(piece.file, index, line, row.cause)
                    continue
                text = row.content if isinstance(row.content, str) else spell_chat(row.content)
                reason = filters.reason(row, text)
                if reason is not None:
                    add(part.filtered, reason, 1)
                    continue
                data = content_bytes(row.content)
                yield Document(row, text, data, digest(data), line, index)
            part.lines[index] = rows.count


def part_path(stage: str, item: int) -> str:
    """Where the record of an item lies."""
    return f"{PARTS}/{stage}/{item:05}.json"


def prepare_unit(job: Job, unit: int, progress: Progress) -> None:
    """Write a unit's shards and its record."""
    part = Part(plan=job.digest, unit=unit)
    dropped = frozenset[int]()
    if job.config.deduplicate:
        from llm.data.prepare.duplicates import dropped_of

        dropped = dropped_of(job, unit)
    with Behind(job.storage) as storage:
        splits = {name: _Split(job, storage, name, unit) for name in SPLITS}
        batch: list[Document] = []
        size = 0
        for ordinal, document in enumerate(job.documents(unit, part, progress)):
            if ordinal in dropped:
                part.duplicates += 1
                continue
            batch.append(document)
            size += len(document.text)
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARS:
                _tokenize(job, batch, splits, part, progress)
                batch, size = [], 0
        _tokenize(job, batch, splits, part, progress)
        for name, split in splits.items():
            part.splits[name] = split.close(part)
    part.samples.sort(key=lambda sample: (sample.piece, sample.line))  # chats are found to be bad a batch later
    job.storage.replace(part_path("units", unit), msgspec.json.encode(part))


def _tokenize(job: Job, batch: list[Document], splits: dict[str, _Split], part: Part, progress: Progress) -> None:
    tokens = 0
    chosen: dict[str, list[Encoded]] = {name: [] for name in splits}
    for document, encoded in _encoded(job, batch, part):
        if not encoded.length:
            add(part.filtered, "no tokens", 1)
            continue
        name = "validation" if is_validation(document.digest, job.config.validation) else "train"
        chosen[name].append(encoded)
        add(part.documents, name, 1)
        add(part.bytes, name, len(document.data))
        add(part.tokens, name, encoded.length)
        tokens += encoded.length
    for name, documents in chosen.items():
        if documents:
            splits[name].add(documents)
    progress(0, tokens)


class Encoded(NamedTuple):
    """A document's tokens, in parts that follow each other, and which are to be learnt; None for all."""

    parts: tuple[NDArray[Any], ...]
    length: int
    loss: NDArray[np.bool_] | None


def _encoded(job: Job, batch: list[Document], part: Part) -> Iterator[tuple[Document, Encoded]]:
    """Tokens of documents, the end's among them."""
    if not batch:
        return
    end = job.tokenizer.end
    tail = np.array([] if end is None else [end], np.uint32)
    if job.config.chat:
        from llm.data.chat import encode_chat

        for document in batch:
            try:
                tokens, loss = encode_chat(job.tokenizer, document.row.content)
            except ValueError as error:
                file = job.plan.units[part.unit][document.piece].file
                part.miss(file, document.piece, document.line, str(error))
                continue
            if not (len(tokens) and int(tokens[-1]) == end):  # else the template has written it
                tokens, loss = np.append(tokens, tail), np.append(loss, np.zeros(len(tail), bool))
            yield document, Encoded((tokens,), len(tokens), loss)
        return
    for document, ids in zip(batch, job.tokenizer.encode_batch([each.text for each in batch]), strict=True):
        yield document, Encoded((ids, tail), len(ids) + len(tail), None)


class _Split:
    """Tokens of one split of a unit, on their way into its shards."""

    def __init__(self, job: Job, storage: Storage, name: str, unit: int) -> None:
        self.name, self.row, self.job = name, job.row, job
        self.writer = ShardWriter(storage, f"{name}-{unit:05}", job.dtype, job.row, job.loss)
        self.waiting: list[tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]] = []
        self.count = self.rows = self.used = self.cut = 0

    def add(self, documents: list[Encoded]) -> None:
        """Raises ConfigError for a token that the tokenizer says it does not have."""
        tokens = np.concatenate([part for each in documents for part in each.parts])
        vocab = self.job.tokenizer.vocab_size
        if int(tokens.max()) >= vocab:
            raise ConfigError(
                f"prepare.tokenizer={self.job.config.tokenizer} gave token {int(tokens.max())}, but has only {vocab}"
            )
        tokens = tokens.astype(self.job.dtype)
        starts = np.zeros(len(tokens), bool)
        starts[np.cumsum([0, *(each.length for each in documents[:-1])])] = True
        given = [each.loss for each in documents if each.loss is not None]
        loss = np.concatenate(given) if given else None
        if self.row is None:
            self.writer.add(tokens, starts, loss)
            return
        self.waiting.append((tokens, starts, loss))
        self.count += len(tokens)
        if self.count >= PACK_TOKENS:
            self._pack()

    def close(self, part: Part) -> Any:
        """Write what is left; all shards."""
        if self.count:
            self._pack()
        if self.row is not None:
            part.rows[self.name], part.used[self.name], part.cut[self.name] = self.rows, self.used, self.cut
        return self.writer.close()

    def _pack(self) -> None:
        assert self.row is not None
        tokens, starts, losses = zip(*self.waiting, strict=True)
        loss = None if losses[0] is None else np.concatenate(losses)
        packed = pack(np.concatenate(tokens), np.concatenate(starts), loss, self.row)
        self.writer.add(packed.tokens, packed.starts, packed.loss)
        self.rows += packed.rows
        self.used += packed.used
        self.cut += packed.cut
        self.waiting, self.count = [], 0


class Behind:
    """A storage whose ``replace`` returns at once: one file is written while the next is worked out."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def replace(self, path: str, data: bytes) -> None:
        """Raises what the write before this one has met."""
        self._wait()
        self._last = self._pool.submit(self._storage.replace, path, data)

    def _wait(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
