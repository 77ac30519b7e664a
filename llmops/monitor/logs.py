"""Output of a run's ranks, from ``logs/<attempt>/<node>/rank<r>.NNNNNN.log``: the end, all of it, or as it grows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmops.monitor.text import last_state, terminal_line
from llmops.runs.model import Run
from llmops.runs.store import Store

BLOCK = 1 << 16
MAX_HELD = 1 << 20  # a longer line is cut: a program may never write a newline
MAX_TAIL = 1 << 23  # of one file; where lines are so long that this holds fewer than were asked for, so be it
PROGRESS_S = 10.0  # how often a followed progress bar, which ends its lines with \r, is shown

_PART = re.compile(r"(?:rank(?P<rank>\d+)|(?P<supervisor>supervisor))\.(?P<part>\d{6,})\.log")


class LogLine(NamedTuple):
    """One line, as the program wrote it, without its newline; of a progress bar, what it last showed."""

    attempt: int
    source: str  # the rank, or "supervisor@<node>"
    text: str


class Stream(NamedTuple):
    """What is read: one rank of one attempt."""

    attempt: int
    rank: int  # -1: the supervisor
    node: str

    @property
    def source(self) -> str:
        return str(self.rank) if self.rank >= 0 else f"supervisor@{self.node}"


def tail(
    run: Run, rank: int | None = None, attempt: int | None = None, n: int | None = None, supervisor: bool = False
) -> Iterator[LogLine]:
    """Lines of the chosen ranks and attempts (None: all), attempt by attempt and rank by rank.

    ``n``: only the last ``n`` lines of each rank, from older attempts too where the newest has fewer; reads no more
    than the ends of the files. ``supervisor``: those of the supervisors instead of the ranks'.
    """
    wanted = _Selection(rank, attempt, supervisor)
    for cursor in _cursors(run.store, wanted, n):
        yield from cursor.advance()
        yield from cursor.rest()


def written(run: Run) -> list[Stream]:
    """All ranks of all attempts that have output, if only an empty file."""
    return list(_Selection(None, None, False).streams(run.store))


def follow(
    run: Run,
    done: Callable[[], bool],
    rank: int | None = None,
    attempt: int | None = None,
    n: int | None = 10,
    supervisor: bool = False,
    poll_s: float | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[LogLine]:
    """The last ``n`` lines (None: all), then every line as it is completed, new ranks and attempts included.

    Ends after ``done()`` said True and what was written by then has been read. ``done`` is asked whenever nothing new
    was found. ``poll_s``: seconds between two looks; by default 0.5, and 2 for an object store.
    """
    wanted = _Selection(rank, attempt, supervisor)
    pause = poll_s if poll_s is not None else 0.5 if run.store.local_path else 2.0
    cursors = {cursor.stream: cursor for cursor in _cursors(run.store, wanted, n)}
    over, first_look = False, True
    while True:
        new = False
        newest = max((stream.attempt for stream in cursors), default=0)
        for stream in sorted(stream for stream in cursors if first_look or stream.attempt >= newest - 1):
            for line in cursors[stream].advance():
                new = True
                yield line
            yield from cursors[stream].progress(time.monotonic())
        first_look = False
        if over and not new:
            break
        over = over or (not new and done())  # one more look follows
        if not new and not over:
            wait(pause)
        _extend(run.store, wanted, cursors)
    for stream in sorted(cursors):
        yield from cursors[stream].rest()


def prefixed(run: Run, rank: int | None, attempt: int | None, following: bool = False) -> bool:
    """Can there be lines of more than one stream, so that each must say whose it is?"""
    ranks = run.record.nodes * run.record.ranks_per_node if run.record else 2
    return (rank is None and ranks > 1) or (attempt is None and (following or len(run.store.list("logs")) > 1))


def printable(line: LogLine, prefix: bool, terminal: bool) -> str:
    """The line to print. For a terminal, escape sequences other than colours are taken out; a pipe gets them all."""
    text = terminal_line(line.text) if terminal else line.text
    return f"[{line.attempt}/{line.source}] {text}" if prefix else text


class _Selection(NamedTuple):
    rank: int | None
    attempt: int | None
    supervisor: bool

    def streams(self, store: Store, since: int = 0) -> dict[Stream, list[str]]:
        """Part files of each chosen stream, oldest first, in order of attempt and rank."""
        found: dict[Stream, list[tuple[int, str]]] = {}
        for name in store.list("logs"):
            if not name.isdigit() or int(name) < since or self.attempt not in (None, int(name)):
                continue
            for node in store.list(f"logs/{name}"):
                for file in store.list(f"logs/{name}/{node}"):
                    match = _PART.fullmatch(file)
                    if match is None or bool(match["supervisor"]) != self.supervisor:
                        continue
                    rank = int(match["rank"]) if match["rank"] else -1
                    if self.rank is None or self.supervisor or self.rank == rank:
                        stream = Stream(int(name), rank, node)
                        found.setdefault(stream, []).append((int(match["part"]), f"logs/{name}/{node}/{file}"))
        return {stream: [path for _, path in sorted(found[stream])] for stream in sorted(found)}


class _Cursor:
    """How far one stream has been read, and the beginning of its next line."""

    def __init__(self, store: Store, stream: Stream, paths: list[str], part: int = 0, offset: int = 0) -> None:
        self.store, self.stream, self.paths = store, stream, paths
        self.part, self.offset = part, offset
        self.held = b""
        self.shown = time.monotonic()

    def advance(self) -> Iterator[LogLine]:
        """All lines that are complete by now."""
        while self.part < len(self.paths):
            # Taken before the read: a part that has a successor is complete, and what is read of it is all.
            last = self.part + 1 == len(self.paths)
            data = self.store.read(self.paths[self.part], self.offset, self.offset + BLOCK)
            if not data:
                if last:
                    return
                self.part, self.offset = self.part + 1, 0
                continue
            self.offset += len(data)
            *lines, self.held = (self.held + data).split(b"\n")
            for line in lines:
                yield self._line(line)
            if len(self.held) > MAX_HELD:
                # What a progress bar has overwritten is gone for good; a line that is simply long is cut.
                bar = b"\r" in self.held
                if not bar:
                    yield self._line(self.held)
                self.held = self.held.rsplit(b"\r", 1)[1] if bar else b""

    def progress(self, now: float) -> Iterator[LogLine]:
        """What a progress bar shows that has not ended its line, now and then."""
        if b"\r" in self.held.rstrip(b"\r") and now - self.shown >= PROGRESS_S:
            self.shown = now
            shown, self.held = self.held.rsplit(b"\r", 1)
            yield self._line(shown)

    def rest(self) -> Iterator[LogLine]:
        """The last line, if nobody ended it."""
        if self.held:
            yield self._line(self.held)
            self.held = b""

    def _line(self, line: bytes) -> LogLine:
        return LogLine(self.stream.attempt, self.stream.source, last_state(line.decode("utf-8", "replace")))


def _cursors(store: Store, wanted: _Selection, n: int | None) -> list[_Cursor]:
    """A cursor for each stream, at its beginning, or where the last ``n`` lines of its rank begin."""
    streams = wanted.streams(store)
    if n is None:
        return [_Cursor(store, stream, paths) for stream, paths in streams.items()]
    missing: dict[str, int] = {}  # lines still wanted, of each rank; older attempts give what newer ones lack
    cursors = []
    for stream, paths in reversed(streams.items()):
        left = missing.setdefault(stream.source, n)
        part, offset = len(paths) - 1, store.size(paths[-1])
        for index in range(len(paths) - 1, -1, -1):
            if left == 0:
                break
            part = index
            offset, found = _last_lines(store, paths[index], left)
            left -= found
        missing[stream.source] = left
        cursors.append(_Cursor(store, stream, paths, part, offset))
    return cursors[::-1]


def _last_lines(store: Store, path: str, n: int) -> tuple[int, int]:
    """Where the last ``n`` lines of a file begin, and how many there are."""
    size = store.size(path)
    found, end = 0, size
    while end > 0:
        if size - end >= MAX_TAIL:
            return end, found + 1
        start = max(0, end - BLOCK)
        block = store.read(path, start, end)
        position = len(block)
        while (position := block.rfind(b"\n", 0, position)) >= 0:
            if start + position == size - 1:
                continue  # it ends the last line
            found += 1
            if found == n:
                return start + position + 1, n
        end = start
    return 0, found + 1 if size else 0


def _extend(store: Store, wanted: _Selection, cursors: dict[Stream, _Cursor]) -> None:
    """Take in parts, ranks and attempts that have appeared. An attempt before the last two has nothing to add."""
    newest = max((stream.attempt for stream in cursors), default=0)
    for stream, paths in wanted.streams(store, since=newest - 1).items():
        if stream in cursors:
            cursors[stream].paths = paths
        else:
            cursors[stream] = _Cursor(store, stream, paths)
