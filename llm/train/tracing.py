"""A rank's phase trace: what it did when, as Chrome-trace events in ``traces/<attempt>/rank<N>.<segment>.json``.

Perfetto (ui.perfetto.dev) and chrome://tracing show such files; ``python -m llm.tools.merge_traces`` makes one of all.
The format: "Trace Event Format", JSON object form, complete events (``ph`` X), in microseconds since the epoch.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llm.utils.storage import Storage

SEGMENT_S = 60.0  # seconds from one segment to the next
SEGMENT_EVENTS = 50_000  # or so many events, some 5 MB
PUT_S = 30.0  # what an object store may take for one


class Trace:
    """Segments are written by a thread, and never again once they are there.

    What cannot be written is a warning, the first time, and lost: a trace never holds training up.
    """

    def __init__(self, storage: Storage, attempt: int, rank: int) -> None:
        self._storage, self._rank = storage, rank
        self._path = f"traces/{attempt:04d}/rank{rank:05d}"
        self._segment = 0
        self._events: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trace")
        self._writing: Future[None] | None = None
        self._warned = False

    def add(self, name: str, began: float, ended: float, step: int | None = None) -> None:
        """One event, in seconds since the epoch."""
        event = {"name": name, "ph": "X", "ts": began * 1e6, "dur": (ended - began) * 1e6, "pid": self._rank, "tid": 0}
        self._events.append(event if step is None else {**event, "args": {"step": step}})
        if len(self._events) >= SEGMENT_EVENTS or time.monotonic() - self._began >= SEGMENT_S:
            self._seal()

    def close(self) -> None:
        """Write the last segment, and wait until it is there."""
        if self._writing is not None:
            self._writing.result()
        self._seal()
        self._thread.shutdown()
        if self._writing is not None:
            self._writing.result()

    def _seal(self) -> None:
        self._began = time.monotonic()
        if not self._events or (self._writing is not None and not self._writing.done()):
            return  # one at a time: a slow store makes segments longer
        events, self._events = self._events, []
        path, self._segment = f"{self._path}.{self._segment:06d}.json", self._segment + 1
        self._writing = self._thread.submit(self._write, path, events)

    def _write(self, path: str, events: list[dict[str, Any]]) -> None:
        process = {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": f"rank {self._rank}"}}
        try:
            self._storage.within(PUT_S).create(path, json.dumps({"traceEvents": [process, *events]}).encode())
        except OSError as error:
            if not self._warned:
                print(f"warning: the phase trace has gaps: {error}", file=sys.stderr, flush=True)
            self._warned = True
