"""What is read when somebody asks: on threads, once for all who ask at the same time, and never for too long."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from llmops.errors import ClusterError

THREADS = 8
MOST = 100  # that are under way or wait for a thread
KEEP_S = 2.0


@dataclass
class _Entry:
    fetch: Callable[[], bytes]
    answer: asyncio.Future[bytes]
    keep_s: float
    waiting: int = 0
    ended: float | None = None  # monotonic
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)


class Lookups:
    """Answers by key. To be used from one event loop.

    The threads are daemons: one that a dead file system holds does not keep the process from ending.
    """

    def __init__(self, timeout_s: float = 10.0, threads: int = THREADS) -> None:
        self.timeout_s = timeout_s
        self._entries: dict[Hashable, _Entry] = {}
        self._queue: queue.SimpleQueue[tuple[Hashable, _Entry]] = queue.SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    async def get(
        self, key: Hashable, fetch: Callable[[], bytes], keep_s: float = KEEP_S, timeout_s: float | None = None
    ) -> bytes:
        """The answer of ``fetch``, one of the last ``keep_s`` seconds if there is one.

        Raises what ``fetch`` raises, ``TimeoutError`` after ``timeout_s`` seconds, while the look goes on for who asks
        next, and :class:`ClusterError` while too many others are under way.
        """
        self._forget()
        entry = self._entries.get(key)
        if entry is None:
            if sum(each.ended is None for each in self._entries.values()) >= MOST:
                raise ClusterError("too much is being read at once; try again later")
            entry = _Entry(fetch, asyncio.get_running_loop().create_future(), keep_s)
            self._entries[key] = entry
            self._queue.put((key, entry))
        entry.waiting += 1
        try:
            await asyncio.wait({entry.answer}, timeout=self.timeout_s if timeout_s is None else timeout_s)
        finally:
            entry.waiting -= 1
        if not entry.answer.done():
            raise TimeoutError
        return entry.answer.result()

    def _forget(self) -> None:
        now = time.monotonic()
        for key, entry in list(self._entries.items()):
            if entry.ended is not None and now - entry.ended > entry.keep_s:
                del self._entries[key]

    def _work(self) -> None:
        while True:
            key, entry = self._queue.get()
            answer: bytes | Exception
            try:
                if not entry.waiting:  # all have gone while it was in the queue
                    raise TimeoutError
                answer = entry.fetch()
            except Exception as error:  # noqa: BLE001  # the one who asked gets it
                answer = error
            try:
                entry.loop.call_soon_threadsafe(self._settle, key, entry, answer)
            except RuntimeError:  # the loop has ended, and nobody asks any more
                return

    def _settle(self, key: Hashable, entry: _Entry, answer: bytes | Exception) -> None:
        entry.ended = time.monotonic()
        if isinstance(answer, Exception):
            entry.answer.set_exception(answer)
            entry.answer.exception()  # nobody may be left to look at it
            if isinstance(answer, TimeoutError) and self._entries.get(key) is entry:
                del self._entries[key]
        else:
            entry.answer.set_result(answer)
