"""What a screen shows, looked up in the background: a store or a scheduler that hangs never blocks who looks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmops.errors import ClusterError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Seen(Generic[T]):
    """The newest answer, when it was taken, and in one line why there is no newer one."""

    value: T | None = None
    taken: float = 0.0  # epoch seconds; 0 before the first answer
    trouble: str = ""
    number: int = 0  # of looks that ended, so that one who waits can tell a new one


class Feed(Generic[T]):
    """Calls ``fetch`` every ``interval_s`` seconds on a thread of its own.

    ``late_s``: after so many seconds without an answer the trouble is that there is none.
    """

    def __init__(self, fetch: Callable[[], T], interval_s: float, late_s: float = 15.0) -> None:
        self._fetch, self.interval_s, self._late_s = fetch, interval_s, late_s
        self._seen: Seen[T] = Seen()
        self._changed = threading.Condition()
        self._asked = threading.Event()
        self._closed = False
        self._since: float | None = None  # monotonic, when the look under way began
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def seen(self) -> Seen[T]:
        """What is known now; never waits."""
        with self._changed:
            seen, since = self._seen, self._since
        if since is not None and (waited := time.monotonic() - since) > self._late_s:
            return Seen(seen.value, seen.taken, f"no answer for {waited:.0f} s", seen.number)
        return seen

    def wait(self, number: int, timeout_s: float) -> Seen[T]:
        """What is known once more than ``number`` looks have ended, or after ``timeout_s`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._seen.number > number or self._closed, timeout_s)
        return self.seen()

    def refresh(self) -> None:
        """Look again now rather than later."""
        self._asked.set()

    def close(self) -> None:
        """No further look. One that is under way may go on until the process ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._asked.set()

    def _run(self) -> None:
        while not self._closed:
            self._asked.clear()
            with self._changed:
                self._since = time.monotonic()
            try:
                value: T | None = self._fetch()
                trouble = ""
            except (ClusterError, UserError, OSError) as error:
                value, trouble = self._seen.value, " ".join(str(error).split())
            except Exception as error:  # noqa: BLE001 - a mistake of ours is shown, and the looking goes on
                value, trouble = self._seen.value, f"{type(error).__name__}: {' '.join(str(error).split())}"
            with self._changed:
                taken = self._seen.taken if trouble else time.time()
                self._seen = Seen(value, taken, trouble, self._seen.number + 1)
                self._since = None
                self._changed.notify_all()
            self._asked.wait(self.interval_s)


def leave(wait_s: float) -> None:
    """End this process now if a thread still reads a store that hangs: it would keep it for as long as that."""
    deadline = time.monotonic() + wait_s
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                sys.stdout.flush()
                os._exit(0)
