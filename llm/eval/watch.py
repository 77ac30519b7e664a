"""Which commits of a run are to be evaluated, now and while its training goes on. None is removed while it waits.

That a training is over is read from what its supervisor has written: the end of its newest attempt, or of a submission
that never began.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.leases import lease
from llm.checkpoint.lineage import commits, newest_commit
from llm.checkpoint.retention import chain
from llm.utils.config import ConfigError
from llm.utils.storage import Storage

POLL_S = 5.0
HELD = 8  # commits that wait and are kept from being removed; of more, the newest


def select(storage: Storage, step: int | Literal["newest"]) -> Commit:
    """The commit of a step that counts. Raises ConfigError where there is none."""
    newest = newest_commit(storage)
    if newest is None:
        raise ConfigError(f"{storage.url} holds no committed checkpoint yet: evaluate it when it has one")
    if step == "newest":
        return newest
    there = chain(storage, newest)
    for commit in there:
        if commit.step == step:
            return commit
    steps = ", ".join(str(commit.step) for commit in there[-20:])
    raise ConfigError(f"step={step}: {storage.url} has no checkpoint of it; there are those of {steps}")


def is_over(storage: Storage) -> bool:
    """Will the run's trainer commit nothing more? Raises ConfigError where no supervisor has written anything."""
    submissions = [name for name in storage.list("job") if name.isdecimal()]
    if not submissions:
        raise ConfigError(f"follow=true: {storage.url} was not submitted by llmops, so it is not known when it ends")
    newest = max(submissions, key=int)
    names = storage.list(f"job/{newest}")
    attempts = [name for name in storage.list("attempts") if name.isdecimal()]
    if attempts:
        last = max(attempts, key=int)
        start = _object(storage, f"attempts/{last}/start.json")
        if start is not None and start.get("submission") == int(newest):
            end = _object(storage, f"attempts/{last}/end.json")
            return end is not None and (end.get("next") == "end" or "intent.json" in names)
    return "failed.json" in names or "intent.json" in names


def _object(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        value = json.loads(storage.read(path))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Watch:
    """Commits that wait for their evaluation, oldest first, each under a lease until it was taken and is done.

    ``done`` says whether a commit has all its scores. With ``follow`` a thread looks for new ones, until the training
    is over; without, those that there are now are all.
    """

    def __init__(self, storage: Storage, done: Callable[[Commit], bool], follow: bool) -> None:
        self._storage, self._done, self._follow = storage, done, follow
        self._known: set[Commit] = set()
        self._waiting: dict[Commit, contextlib.ExitStack] = {}
        self._current = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._news, self._stop = threading.Event(), threading.Event()
        self._over = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self.last_news = time.monotonic()

    def __enter__(self) -> Watch:
        self._look()
        if self._follow and not self._over:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(POLL_S)  # one that a store holds up dies with the process
        self.release()
        for held in self._waiting.values():
            held.close()

    def take(self, wait_s: float) -> Commit | None:
        """The next commit, kept until :meth:`release`; None where there is none within ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while True:
            self._news.clear()
            if self._failure is not None:
                raise self._failure
            with self._lock:
                if self._waiting:
                    commit = min(self._waiting, key=lambda each: (each.step, each))
                    self._current = self._waiting.pop(commit)
                    self.last_news = time.monotonic()
                    return commit
            left = deadline - time.monotonic()
            if self.over or left <= 0 or not self._news.wait(left):
                return None

    def release(self) -> None:
        """What was taken is done."""
        self._current.close()
        self._current = contextlib.ExitStack()

    @property
    def over(self) -> bool:
        """Is nothing left, and will nothing come?"""
        with self._lock:
            return self._over and not self._waiting

    def _look_on(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self._look()
            except OSError as error:  # a store that is away comes back
                print(f"warning: {self._storage.url} cannot be read now: {error}", file=sys.stderr, flush=True)
            except Exception as error:  # noqa: BLE001 - raised where somebody waits
                self._failure = error
                self._news.set()
                return
            if self._over:
                return

    def _look(self) -> None:
        over = not self._follow or is_over(self._storage)  # before the commits: the last one must be seen
        if self._known:
            there = commits(self._storage)
        else:
            newest = newest_commit(self._storage)
            there = [] if newest is None else chain(self._storage, newest)
        for commit in there:
            if commit in self._known:
                continue
            self._known.add(commit)
            if self._done(commit):
                continue
            held = contextlib.ExitStack()
            try:
                held.enter_context(lease(self._storage, commit, limit_s=float("inf")))
            except CheckpointError:
                continue  # removed a moment ago
            with self._lock:
                self._waiting[commit] = held
                dropped = sorted(self._waiting)[:-HELD] if self._follow else []
                stacks = [(each, self._waiting.pop(each)) for each in dropped]
            for each, stack in stacks:
                stack.close()
                print(f"{each.path} is left out: newer ones wait, and evaluating is slower than saving", flush=True)
        with self._lock:
            self._over = over
        self._news.set()
