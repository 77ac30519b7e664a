"""Metrics of a run: JSON lines in numbered parts, ``metrics/<attempt>/000000.jsonl``. Rank 0 alone writes."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

PART_SECONDS = 10.0  # an object store cannot append: a new part at most this often between commits


class Metrics:
    """Append-only. A part that is not the last never changes; only on a local path does the last one grow.

    Lines that are written before :meth:`open` wait in memory. Numbers keep every bit: they are written as ``repr``.
    On an object store a thread puts the parts, and goes on trying: a store that is away does not hold up training.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active  # false on the ranks that do not write
        self._lines: list[str] = []
        self._storage: Storage | None = None
        self._folder = ""
        self._part = 0
        self._stream: IO[str] | None = None
        self._written = time.monotonic()
        self._pending: dict[str, bytes] = {}  # parts that are not known to be in the store
        self._handed: list[str] = []  # of these, what the save in flight takes along
        self._thread = ThreadPoolExecutor(1)
        self._putting: Future[None] | None = None

    def open(self, storage: Storage, attempt: int) -> None:
        """Start the next part of ``attempt``."""
        self._storage, self._folder = storage, f"metrics/{attempt:04d}"
        parts = [int(name.split(".")[0]) for name in storage.list(self._folder) if name.endswith(".jsonl")]
        self._part = max(parts, default=-1) + 1
        if isinstance(storage, LocalStorage):
            storage.write(self._path(), b"")
            self._stream = storage.path(self._path()).open("a")
        self.flush()

    def write(self, kind: str, at: float | None = None, **values: Any) -> None:
        """Add one line, stamped now or ``at`` seconds since the epoch; on a local path it is readable at once."""
        if not self._active:
            return
        self._lines.append(json.dumps({"kind": kind, **values, "time": time.time() if at is None else at}) + "\n")
        if self._stream is not None or time.monotonic() - self._written >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand over what was written, without waiting for an object store."""
        if self._storage is None:
            return
        if self._stream is not None:
            text, self._lines = "".join(self._lines), []
            self._stream.write(text)
            self._stream.flush()
        else:
            self._seal()
            if self._pending and (self._putting is None or self._putting.done()):
                self._putting = self._thread.submit(self._put)
        self._written = time.monotonic()

    def hand_over(self) -> dict[str, bytes]:
        """What must be in the store before a commit of this moment: path -> content. A local path is synced."""
        self.flush()
        if self._stream is not None:
            os.fsync(self._stream.fileno())
        self._handed = list(self._pending)
        return dict(self._pending)

    def committed(self) -> None:
        """The checkpoint counts, so what was handed over is there."""
        for path in self._handed:
            self._pending.pop(path, None)
        self._handed = []

    def close(self) -> None:
        """Write everything out."""
        self.flush()
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
        if self._storage is None or self._stream is not None:
            return
        if self._putting is not None:
            self._putting.result()
        self._put()
        if self._pending:
            print(f"warning: {len(self._pending)} parts of the metrics are lost", file=sys.stderr, flush=True)

    def _seal(self) -> None:
        if self._lines:
            text, self._lines = "".join(self._lines), []
            self._pending[self._path()] = text.encode()
            self._part += 1

    def _put(self) -> None:
        """Put what is pending; what fails stays pending, for the next flush or commit."""
        assert self._storage is not None
        for path, data in list(self._pending.items()):
            try:
                self._storage.create(path, data)
            except OSError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)
                return
            self._pending.pop(path, None)

    def _path(self) -> str:
        return f"{self._folder}/{self._part:06d}.jsonl"
