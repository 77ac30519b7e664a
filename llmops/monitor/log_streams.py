"""Streams of output in a run directory: which there are, and one of them read line by line from anywhere in it.

A stream is ``logs/<attempt>/<node>/rank<r>.NNNNNN.log``, in parts. Each line begins with the time at which it was
stored; lines without one, in foreign or older files, have that of the line before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from llmops.agent.output import STAMP, stamp
from llmops.monitor.text import last_state
from llmops.runs.model import Run
from llmops.runs.store import Store

THREADS = 16  # that read at the same time, where a read is a round trip to a server
_PART = re.compile(r"(?:rank(?P<rank>\d+)|(?P<supervisor>supervisor))\.(?P<part>\d{6,})\.log")
# Lines follow each other without a gap. A file system that lost its last write leaves zeros: they are no text.
_LINES = re.compile(r"\0*(?:([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z) )?(.*)\n")


class LogLine(NamedTuple):
    """One line, as the program wrote it, without its newline; of a progress bar, what it last showed."""

    attempt: int
    source: str  # the rank, or "supervisor@<node>"
    text: str
    stamp: str = ""  # when it was stored, as 2026-11-23T03:27:00.123Z; never goes back within a stream; "": not known
    node: str = ""

    @property
    def time(self) -> float | None:
        """Epoch seconds."""
        return epoch(self.stamp)


class Stream(NamedTuple):
    """What is read: one rank of one attempt."""

    attempt: int
    rank: int  # -1: the supervisor
    node: str

    @property
    def source(self) -> str:
        return str(self.rank) if self.rank >= 0 else f"supervisor@{self.node}"


@dataclass(frozen=True)
class Selection:
    """Which streams, and which of their lines. None and empty: all."""

    ranks: int | Container[int] | None = None
    attempt: int | None = None
    supervisor: bool = False  # the supervisors' streams instead of the ranks'
    nodes: Container[str] | None = None
    since: float | None = None  # epoch seconds
    pattern: re.Pattern[str] | None = None  # is searched in the text without the time

    def has(self, stream: Stream) -> bool:
        """Whether the stream is one of them."""
        if self.attempt not in (None, stream.attempt) or self.supervisor != (stream.rank < 0):
            return False
        if self.nodes is not None and stream.node not in self.nodes:
            return False
        if self.ranks is None or self.supervisor:
            return True
        return stream.rank == self.ranks if isinstance(self.ranks, int) else stream.rank in self.ranks

    @property
    def since_stamp(self) -> str:
        return "" if self.since is None else stamp(self.since).decode().rstrip()


EVERYTHING = Selection()


def epoch(text: str) -> float | None:
    """Epoch seconds of a line's stamp; None for what is no time, as 2026-13-99T…"""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def find_streams(
    store: Store, wanted: Selection, since: int = 0, pool: ThreadPoolExecutor | None = None
) -> dict[Stream, list[str]]:
    """Part files of each chosen stream, oldest first, in order of attempt and rank. ``since``: the first attempt."""
    attempts = [name for name in store.list("logs") if name.isdecimal() and name.isascii() and int(name) >= since]
    folders = [
        (int(name), node, f"logs/{name}/{node}")
        for name in attempts
        if wanted.attempt in (None, int(name))
        for node in store.list(f"logs/{name}")
        if wanted.nodes is None or node in wanted.nodes
    ]
    names = [name for _, _, name in folders]
    listings = pool.map(store.list, names) if pool else map(store.list, names)
    found: dict[Stream, list[tuple[int, str]]] = {}
    for (attempt, node, name), files in zip(folders, listings, strict=True):
        for file in files:
            if (match := _PART.fullmatch(file)) is None:
                continue
            stream = Stream(attempt, int(match["rank"]) if match["rank"] else -1, node)
            if wanted.has(stream):
                found.setdefault(stream, []).append((int(match["part"]), f"{name}/{file}"))
    return {stream: [path for _, path in sorted(found[stream])] for stream in sorted(found)}


def started(run: Run) -> Mapping[int, str]:
    """When each attempt began, as its lines would say: the time of lines that have none."""
    return {number: stamp(attempt.start.time).decode().rstrip() for number, attempt in run.by_number.items()}


@dataclass(frozen=True)
class Limits:
    """How much is held of each stream, so that all together stay within tens of megabytes."""

    block: int = 1 << 16
    held: int = 1 << 20  # a longer line is cut: a program may never write a newline

    @classmethod
    def of(cls, streams: int, remote: bool) -> Limits:
        """For so many streams at a time. ``remote``: each read is a request, and the next one is under way."""
        count = max(streams, 1)
        block = max((1 << 24 if remote else 1 << 23) // count, 1 << 12)
        return cls(min(block, 1 << 18 if remote else 1 << 16), min(1 << 20, max((1 << 26) // count, 1 << 16)))


class Cursor:
    """How far one stream has been read, and the beginning of its next line."""

    def __init__(self, store: Store, stream: Stream, paths: list[str], wanted: Selection = EVERYTHING) -> None:
        self.store, self.stream, self.paths, self.wanted = store, stream, paths, wanted
        self.part = self.offset = 0
        self.limits = Limits()
        self.held = b""
        self.last = ""  # the latest stamp so far
        self.pool: ThreadPoolExecutor | None = None  # of whom the next block is fetched while this one is looked at
        self.shown = time.monotonic()
        self._moved = False
        self._ahead: Future[bytes] | bytes | None = None
        self._problems: set[str] = set()

    def fetch(self) -> None:
        """Read the next block ahead of its use: called on other threads, before any line is asked for."""
        if self._ahead is None:
            self._ahead = self._read()

    def _next(self) -> bytes:
        ahead, self._ahead = self._ahead, None
        data = ahead.result() if isinstance(ahead, Future) else self._read() if ahead is None else ahead
        if data and self.pool is not None:
            self._ahead = self.pool.submit(self._read)
        return data

    def _read(self) -> bytes:
        """The next block; empty when all that is written was read."""
        while self.part < len(self.paths):
            # Taken before the read: a part that has a successor is complete, and what is read of it is all.
            last = self.part + 1 == len(self.paths)
            path = self.paths[self.part]
            try:
                data = self.store.read(path, self.offset, self.offset + self.limits.block)
            except FileNotFoundError:  # a folder of that name, a link to nowhere, or removed just now
                data = self._problem(path)
            else:
                self.offset += len(data)
            if data:
                return data
            if last:
                break
            self.part, self.offset = self.part + 1, 0
        return b""

    def _problem(self, path: str) -> bytes:
        """A line about a part that is no file; once, since it is asked for again and again while a run is followed."""
        known = path in self._problems
        self._problems.add(path)
        return b"" if known else f"[llmops: {path} is no file that can be read]\n".encode()

    def advance(self) -> Iterator[list[LogLine]]:
        """All lines that are complete by now, those of a block together; a block may have none that is wanted."""
        while data := self._next():
            self._moved = True
            self.held += data
            end = self.held.rfind(b"\n") + 1
            if end:
                whole, self.held = self.held[:end], self.held[end:]
                yield self._lines(whole)
            # What a progress bar has overwritten is gone for good; a line that is simply long is cut.
            if len(self.held) > min(4096, self.limits.held) and b"\r" in self.held.rstrip(b"\r"):
                self.held = self._begin() + self.held[self.held.rstrip(b"\r").rindex(b"\r") + 1 :]
            if len(self.held) > self.limits.held:
                yield self.rest()

    def progress(self, now: float, every_s: float) -> list[LogLine]:
        """What a progress bar shows that has not ended its line, now and then."""
        if b"\r" not in self.held.rstrip(b"\r") or now - self.shown < every_s:
            return []
        self.shown = now
        shown, rest = self.held.rsplit(b"\r", 1)
        self.held = self._begin() + rest
        return self._lines(shown + b"\n")

    def rest(self) -> list[LogLine]:
        """What is held: the last line, if nobody ended it."""
        held, self.held = self.held, b""
        return self._lines(held + b"\n") if held else []

    def whole(self) -> Iterator[list[LogLine]]:
        """All lines, that which nobody ended included."""
        yield from self.advance()
        yield self.rest()

    def take_moved(self) -> bool:
        """Whether anything was read since this was asked last."""
        moved, self._moved = self._moved, False
        return moved

    def _begin(self) -> bytes:
        """The stamp of the line that is held."""
        match = STAMP.match(self.held)
        return match[0] if match else b""

    def _lines(self, data: bytes) -> list[LogLine]:
        """The lines of ``data``, which ends in a newline, as far as they are wanted."""
        attempt, source, node = self.stream.attempt, self.stream.source, self.stream.node
        whole = data.decode("utf-8", "replace")
        bar = "\r" in whole
        since, pattern = self.wanted.since_stamp, self.wanted.pattern
        last, found = self.last, []
        for written, text in _LINES.findall(whole):
            if written > last:
                last = written
            if last < since:
                continue
            shown = last_state(text) if bar else text
            if pattern is None or pattern.search(shown):
                # Half the time of LogLine(…), and there are millions.
                found.append(tuple.__new__(LogLine, (attempt, source, shown, last, node)))
        self.last = last
        return found
