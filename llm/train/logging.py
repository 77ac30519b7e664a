"""Metrics of a run: JSON lines in numbered parts, ``metrics/<attempt>/000000.jsonl``. Rank 0 alone writes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llm.utils.local_storage import LocalStorage
from llm.utils.storage import Storage

PART_SECONDS = 10.0  # what cannot append gets a new part at most this often between commits
PUT_S = 10.0  # an object store that has not taken what is pending by then is asked again later


class Metrics:
    """Append-only. A part that is not the last never changes; only on a local path does the last one grow.

    Lines that are written before :meth:`open` wait in memory. Numbers keep every bit: they are written as ``repr``.
    On an object store a thread puts the parts, and goes on trying: a store that is away does not hold up training.
    Nor does a full disk: what does not fit into the growing part is treated in the same way.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active  # false on the ranks that do not write
        self._lines: list[str] = []
        self._storage: Storage | None = None
        self._folder = ""
        self._part = 0
        self._growing: int | None = None  # descriptor of the last part, on a local path
        self._size = self._synced = 0  # its bytes, and those of them that are durable; both end with a line
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
            self._growing = os.open(storage.path(self._path()), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self.flush()

    def write(self, kind: str, at: float | None = None, **values: Any) -> None:
        """Add one line, stamped now or ``at`` seconds since the epoch; on a local path it is readable at once."""
        if not self._active:
            return
        self._lines.append(json.dumps({"kind": kind, **values, "time": time.time() if at is None else at}) + "\n")
        if self._growing is not None or time.monotonic() - self._written >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand over what was written, without waiting for an object store."""
        if self._storage is None:
            return
        if self._growing is not None:
            self._append(self._growing)
        if self._growing is None:
            self._seal()
            if self._putting is not None and self._putting.done():
                self._putting.result()  # what is no OSError is a mistake of this program
                self._putting = None
            if self._pending and self._putting is None:
                self._putting = self._thread.submit(self._put)
        self._written = time.monotonic()

    def hand_over(self) -> dict[str, bytes]:
        """What must be in the store before a commit of this moment: path -> content. A local path is synced."""
        self.flush()
        if self._growing is not None and not self._sync(self._growing):
            self.flush()
        self._handed = list(self._pending)
        return dict(self._pending)

    def pending(self) -> dict[str, bytes]:
        """What a snapshot of this moment takes along, in case that nobody else can put it."""
        self.flush()
        return dict(self._pending)

    def committed(self) -> None:
        """The checkpoint counts, so what was handed over is there."""
        for path in self._handed:
            self._pending.pop(path, None)
        self._handed = []

    def close(self) -> None:
        """Write everything out."""
        self.flush()
        if self._growing is not None and self._sync(self._growing):
            os.close(self._growing)
            return
        if self._storage is None:
            return
        self._seal()
        if self._putting is not None:
            self._putting.result()
        self._put()
        if self._pending:
            print(f"warning: {len(self._pending)} parts of the metrics are lost", file=sys.stderr, flush=True)

    def _append(self, descriptor: int) -> None:
        data = memoryview("".join(self._lines).encode())
        try:
            done = 0
            while done < len(data):
                done += os.write(descriptor, data[done:])
        except OSError as error:
            self._stop_growing(descriptor, self._size, error)
        else:
            self._lines = []
            self._size += len(data)

    def _sync(self, descriptor: int) -> bool:
        """Make the growing part durable. Where that fails, the lines that may be lost are written anew."""
        try:
            os.fsync(descriptor)
        except OSError as error:
            self._lines.insert(0, os.pread(descriptor, self._size - self._synced, self._synced).decode())
            self._stop_growing(descriptor, self._synced, error)
            return False
        self._synced = self._size
        return True

    def _stop_growing(self, descriptor: int, size: int, error: OSError) -> None:
        """The last part stays as it was when it had ``size`` bytes; what follows goes into parts of their own."""
        print(f"warning: cannot append to {self._path()}: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        os.close(descriptor)
        self._growing = None
        self._part += 1

    def _seal(self) -> None:
        if self._lines:
            text, self._lines = "".join(self._lines), []
            self._pending[self._path()] = text.encode()
            self._part += 1

    def _put(self) -> None:
        """Put what is pending; what fails stays pending, for the next flush or commit."""
        assert self._storage is not None
        storage = self._storage.within(PUT_S)
        for path, data in list(self._pending.items()):
            try:
                storage.create(path, data)
            except OSError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)
                return
            self._pending.pop(path, None)

    def _path(self) -> str:
        return f"{self._folder}/{self._part:06d}.jsonl"
