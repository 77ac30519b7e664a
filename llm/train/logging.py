"""Metrics of a run: JSON lines in numbered parts, ``metrics/<attempt>/000000.jsonl``. Rank 0 alone writes."""

from __future__ import annotations

import json
import os
import time
from typing import IO, Any

from llm.utils.storage import LocalStorage, Storage

PART_SECONDS = 10.0  # an object store cannot append: a new part at most this often between commits


class Metrics:
    """Append-only. A part that is not the last never changes; only on a local path does the last one grow.

    Lines that are written before :meth:`open` wait in memory. Numbers keep every bit: they are written as ``repr``.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active  # false on the ranks that do not write
        self._lines: list[str] = []
        self._storage: Storage | None = None
        self._folder = ""
        self._part = 0
        self._stream: IO[str] | None = None
        self._written = time.monotonic()

    def open(self, storage: Storage, attempt: int) -> None:
        """Start the next part of ``attempt``."""
        self._storage, self._folder = storage, f"metrics/{attempt:04d}"
        parts = [int(name.split(".")[0]) for name in storage.list(self._folder) if name.endswith(".jsonl")]
        self._part = max(parts, default=-1) + 1
        if isinstance(storage, LocalStorage):
            storage.write(self._path(), [])
            self._stream = storage.path(self._path()).open("a")
        self.flush()

    def write(self, kind: str, at: float | None = None, **values: Any) -> None:
        """Add one line, stamped now or ``at`` seconds since the epoch; on a local path it is readable at once."""
        if not self._active:
            return
        self._lines.append(json.dumps({"kind": kind, **values, "time": time.time() if at is None else at}) + "\n")
        if self._stream is not None or time.monotonic() - self._written >= PART_SECONDS:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Hand over what was written; ``durable`` waits for the disk. A part of an object store is durable once put."""
        if self._storage is None:
            return
        text, self._lines = "".join(self._lines), []
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()
            if durable:
                os.fsync(self._stream.fileno())
        elif text:
            self._storage.create(self._path(), text.encode())
            self._part += 1
        self._written = time.monotonic()

    def close(self) -> None:
        """Write everything out."""
        self.flush(durable=True)
        if self._stream is not None:
            self._stream.close()

    def _path(self) -> str:
        return f"{self._folder}/{self._part:06d}.jsonl"
