"""The list of runs, looked up once for all who watch, and not at all while nobody does."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from llmops.errors import ClusterError, UserError
from llmops.monitor.feed import Feed, Seen

IDLE_S = 60.0  # so long after the last one has gone, stores and schedulers are left alone
LOOK_S = 1.0  # how often it is checked whether a look is late
HEARTBEAT_S = 15.0


@dataclass(frozen=True)
class Rows:
    """Rows as they are sent, by id, and how many more runs that are over are left out."""

    rows: Mapping[str, bytes] = field(default_factory=dict)
    omitted: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The newest rows, when they were taken, and in one line why there are no newer ones."""

    rows: Rows
    taken: float = 0.0  # epoch seconds; 0 before the first look
    trouble: str = ""
    version: int = 0

    def whole(self) -> bytes:
        """The answer to who asks once."""
        return self._head() + b',"runs":[' + b",".join(self.rows.rows.values()) + b"]}"

    def changes(self, known: dict[str, bytes], first: bool) -> bytes:
        """What differs from the ``known`` rows, which are brought up to date."""
        rows = self.rows.rows
        changed = [row for name, row in rows.items() if known.get(name) != row]
        removed = [name for name in known if name not in rows]
        known.clear()
        known.update(rows)
        gone = json.dumps(removed).encode()
        reset = b"true" if first else b"false"
        return self._head() + b',"reset":' + reset + b',"removed":' + gone + b',"runs":[' + b",".join(changed) + b"]}"

    def _head(self) -> bytes:
        fields = {"taken": self.taken, "now": time.time(), "trouble": self.trouble, "omitted": self.rows.omitted}
        return json.dumps(fields).encode()[:-1]


class Hub:
    """Looks every ``interval_s`` seconds while somebody watches. All but ``fetch`` runs in one event loop."""

    def __init__(self, fetch: Callable[[], Rows], interval_s: float, idle_s: float = IDLE_S) -> None:
        self._fetch, self._interval_s, self._idle_s = fetch, interval_s, idle_s
        self.snapshot = Snapshot(Rows())
        self.closed = False
        self._feed: Feed[Rows] | None = None
        self._number = 0
        self._defect = ""
        self._watchers = 0
        self._asked = time.monotonic()
        self._wake = asyncio.Event()
        self._published = asyncio.Event()

    async def run(self) -> None:
        """Until :meth:`close`."""
        while not self.closed:
            if self._feed is None:
                self._feed, self._number = Feed(self._look, self._interval_s), 0
            seen = await asyncio.to_thread(self._feed.wait, self._number, LOOK_S)
            self._publish(seen)
            if not self._watchers and time.monotonic() - self._asked > self._idle_s:
                self._feed.close()
                self._feed = None
                self._wake.clear()
                await self._wake.wait()

    def _look(self) -> Rows:
        """On the feed's thread, which must outlive what nobody has thought of."""
        try:
            return self._fetch()
        except (ClusterError, UserError, OSError):
            raise
        except Exception as error:
            said = f"this is a defect of llmops: {type(error).__name__}: {error}"
            if said != self._defect:
                traceback.print_exception(error, file=sys.stderr)
            self._defect = said
            raise ClusterError(said) from error

    def close(self) -> None:
        """Ends all streams."""
        self.closed = True
        if self._feed is not None:
            self._feed.close()
        self._wake.set()
        self._published.set()

    def refresh(self) -> None:
        """Look now rather than later."""
        if self._feed is not None:
            self._feed.refresh()

    def wanted(self) -> None:
        """Somebody asks: look again if nobody did."""
        self._asked = time.monotonic()
        self._wake.set()

    async def first(self, timeout_s: float) -> Snapshot:
        """What is known, after the first look if there was none yet, but not longer than ``timeout_s`` later."""
        self.wanted()
        deadline = time.monotonic() + timeout_s
        while not (self.snapshot.taken or self.snapshot.trouble or self.closed):
            await self._next(self.snapshot.version, max(deadline - time.monotonic(), 0.0))
            if time.monotonic() >= deadline:
                break
        return self.snapshot

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: ``runs`` after every look, with what has changed; ``trouble`` when there is some."""
        known: dict[str, bytes] = {}
        version, taken, trouble, first = -1, 0.0, "", True
        self._watchers += 1
        self.wanted()
        try:
            while not self.closed:
                now = self.snapshot
                version = now.version
                if now.taken and (now.taken != taken or first):
                    yield event("runs", now.changes(known, first))
                    taken, first = now.taken, False
                if now.trouble != trouble:
                    trouble = now.trouble
                    yield event("trouble", json.dumps({"trouble": trouble, "taken": now.taken}).encode())
                if not await self._next(version, HEARTBEAT_S):
                    yield b": still here\n\n"
        finally:
            self._watchers -= 1
            self._asked = time.monotonic()

    async def _next(self, version: int, timeout_s: float) -> bool:
        """Wait for something newer than ``version``; False where none came in time."""
        while self.snapshot.version <= version and not self.closed:
            try:
                await asyncio.wait_for(self._published.wait(), timeout_s)
            except TimeoutError:
                return False
        return True

    def _publish(self, seen: Seen[Rows]) -> None:
        late = re.sub(r"\d+", "", seen.trouble) != re.sub(r"\d+", "", self.snapshot.trouble)
        if seen.number <= self._number and not late:
            return
        self._number = seen.number
        rows = self.snapshot.rows if seen.value is None else seen.value
        taken = seen.taken or self.snapshot.taken
        self.snapshot = Snapshot(rows, taken, seen.trouble, self.snapshot.version + 1)
        published, self._published = self._published, asyncio.Event()
        published.set()


def event(name: str, data: bytes) -> bytes:
    """One event of the stream. JSON has no newline of its own."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
