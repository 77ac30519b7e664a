"""Answers of a model that are not scored yet, kept in the run directory: a stopped evaluation goes on from them."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from llm.train.world import World
from llm.utils.storage import Storage

PART_SECONDS = 20.0  # of work that a crash may cost; a stop request costs none


class Journal:
    """Answer by key, in parts of JSON lines: ``<folder>/<writer>-000000.jsonl``. Rank 0 alone reads and writes.

    All ranks make one together, and add the same answers to it.
    """

    def __init__(self, storage: Storage, folder: str, world: World) -> None:
        self._storage, self._folder, self._writes = storage, folder, world.rank == 0
        self._fresh: list[str] = []
        self._writer, self._part = secrets.token_hex(4), 0
        self._written = time.monotonic()
        data = b"".join(storage.read(f"{folder}/{name}") for name in storage.list(folder)) if self._writes else b""
        lines = world.bytes_from_first(data).splitlines()
        self._answers: dict[str, Any] = dict(json.loads(line) for line in lines)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, key: str, answer: Any) -> None:
        """Remember an answer, which JSON must be able to hold."""
        self._answers[key] = answer
        self._fresh.append(json.dumps([key, answer]))
        if time.monotonic() - self._written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write down what is new."""
        if self._writes and self._fresh:
            data = "".join(line + "\n" for line in self._fresh).encode()
            self._storage.create(f"{self._folder}/{self._writer}-{self._part:06d}.jsonl", data)
            self._part += 1
        self._fresh = []
        self._written = time.monotonic()

    def clear(self) -> None:
        """The evaluation is scored: nobody needs the answers."""
        if self._writes:
            self._storage.remove_folder(self._folder)


def key(kind: str, arguments: Sequence[Any], repeat: int) -> str:
    """Of the ``repeat``-th time that a request is made."""
    return hashlib.sha256(json.dumps([kind, list(arguments), repeat], sort_keys=True).encode()).hexdigest()[:24]
