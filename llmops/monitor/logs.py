"""Output of a run's ranks, merged by time: the end, all of it, or as it grows.

Lines of one attempt come in order of their times, those of one rank always in the order in which it wrote them, and
those of an attempt before those of the next, whatever the clocks of the nodes say. Of each stream one block is held.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import attrgetter

from llmops.monitor import log_positions
from llmops.monitor.log_merge import merge
from llmops.monitor.log_streams import (
    EVERYTHING,
    THREADS,
    Cursor,
    Limits,
    LogLine,
    Selection,
    Stream,
    epoch,
    find_streams,
    started,
)
from llmops.monitor.text import clean, clean_lines, terminal_line
from llmops.runs.model import Run

__all__ = ["LogLine", "Selection", "Stream", "Style", "follow", "prefixed", "printable", "tail", "written"]

PROGRESS_S = 10.0  # how often a followed progress bar, which ends its lines with \r, is shown
SKEW_S = 3600.0  # that clocks of a cluster may differ by, before lines count as older than the end of their attempt
MANY = 32  # streams, from which on even a local file system is asked by several threads: it may be a slow NFS
PALETTE = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)  # of prefixes, by rank; red is for errors


def tail(
    run: Run,
    rank: int | Container[int] | None = None,
    attempt: int | None = None,
    n: int | None = None,
    supervisor: bool = False,
    wanted: Selection | None = None,
) -> Iterator[LogLine]:
    """Lines of the chosen ranks and attempts (None: all), attempt by attempt and merged by time.

    ``n``: only the last ``n`` lines of each rank, from older attempts too where the newest has fewer; reads no more
    than the ends of the files. ``supervisor``: those of the supervisors instead of the ranks'. ``wanted``: instead of
    all these but ``n``.
    """
    wanted = wanted or Selection(rank, attempt, supervisor)
    with _threads() as pool:
        cursors = _cursors(run, wanted, n, pool)
        for _, group in groupby(cursors, lambda cursor: cursor.stream.attempt):
            of_attempt = list(group)
            _prepare(run, of_attempt, pool)
            yield from merge([cursor.whole() for cursor in of_attempt])


def written(run: Run) -> list[Stream]:
    """All ranks of all attempts that have output, if only an empty file."""
    with _threads() as pool:
        return list(find_streams(run.store, EVERYTHING, pool=pool))


def follow(
    run: Run,
    done: Callable[[], bool],
    rank: int | Container[int] | None = None,
    attempt: int | None = None,
    n: int | None = 10,
    supervisor: bool = False,
    poll_s: float | None = None,
    wait: Callable[[float], object] = time.sleep,
    wanted: Selection | None = None,
) -> Iterator[LogLine]:
    """The last ``n`` lines (None: all), then every line as it is completed, new ranks and attempts included.

    What is found at one look is merged by time; what comes later comes later. Ends after ``done()`` said True and what
    was written by then has been read. ``done`` is asked whenever nothing new was found. ``poll_s``: seconds between two
    looks; by default 0.5, and 2 for an object store. ``wanted``: instead of rank, attempt and supervisor.
    """
    wanted = wanted or Selection(rank, attempt, supervisor)
    pause = poll_s if poll_s is not None else 0.5 if run.store.local_path else 2.0
    with _threads() as pool:
        cursors = {cursor.stream: cursor for cursor in _cursors(run, wanted, n, pool)}
        over, first_look = False, True
        while True:
            newest = max((stream.attempt for stream in cursors), default=0)
            looked = sorted(stream for stream in cursors if first_look or stream.attempt >= newest - 1)
            for _, group in groupby(looked, attrgetter("attempt")):
                of_attempt = [cursors[stream] for stream in group]
                _prepare(run, of_attempt, pool)
                yield from merge([cursor.advance() for cursor in of_attempt])
                for cursor in of_attempt:
                    yield from cursor.progress(time.monotonic(), PROGRESS_S)
            new = sum(cursors[stream].take_moved() for stream in looked) > 0
            first_look = False
            if over and not new:
                break
            over = over or (not new and done())  # one more look follows
            if not new and not over:
                wait(pause)
            _extend(run, wanted, cursors, pool)
        for stream in sorted(cursors):
            yield from cursors[stream].rest()


def prefixed(run: Run, wanted: Selection, following: bool = False) -> bool:
    """Can there be lines of more than one stream, so that each must say whose it is?"""
    world = run.record.nodes * run.record.ranks_per_node if run.record else 2
    ranks = wanted.ranks
    if isinstance(ranks, int):
        several = False
    else:
        several = world > 1 and (ranks is None or sum(rank in ranks for rank in range(world)) != 1)
    return several or (wanted.attempt is None and (following or len(run.store.list("logs")) > 1))


@dataclass(frozen=True)
class Style:
    """How a line is printed."""

    prefix: bool = False  # whose line it is: [attempt/rank]
    node: bool = False  # and where it ran: [attempt/rank node]
    time: bool = False  # local HH:MM:SS.mmm
    terminal: bool = False  # escape sequences other than colours are taken out; a pipe gets them all
    colour: bool = False  # prefixes coloured by rank, and colours of the program's own


def printable(line: LogLine, style: Style) -> str:
    """The line to print."""
    text = line.text
    if style.terminal:
        text = terminal_line(text) if style.colour else clean_lines(text)[0]
    if style.prefix:
        text = _prefix(line.attempt, line.source, line.node if style.node else "", style.colour) + text
    return f"{clock(line.stamp)} {text}" if style.time else text


def clock(stamp: str) -> str:
    """Local time of day of a stamp, dashes for none."""
    seconds = epoch(stamp)
    return "--:--:--.---" if seconds is None else f"{datetime.fromtimestamp(seconds):%H:%M:%S}.{stamp[20:23]}"


@functools.lru_cache(1 << 14)
def _prefix(attempt: int, source: str, node: str, colour: bool) -> str:
    text = f"[{attempt}/{clean(source)}{f' {clean(node)}' if node else ''}]"
    if not colour:
        return f"{text} "
    shade = PALETTE[int(source) % len(PALETTE)] if source.isdecimal() else 90
    return f"\x1b[{shade}m{text}\x1b[0m "


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that read; none is started before the first is asked. What nobody waits for any more is not begun."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare(run: Run, cursors: Sequence[Cursor], pool: ThreadPoolExecutor) -> None:
    """Share the memory among those that are read together, and read the first block of each."""
    remote = run.store.local_path is None
    limits = Limits.of(len(cursors), remote)
    for cursor in cursors:
        cursor.limits, cursor.pool = limits, pool if remote else None
    if len(cursors) > 1 and (remote or len(cursors) >= MANY):
        for _ in pool.map(Cursor.fetch, cursors):
            pass


def _cursors(run: Run, wanted: Selection, n: int | None, pool: ThreadPoolExecutor) -> list[Cursor]:
    """A cursor for each stream, at its beginning, or where its last ``n`` lines or its wanted time begin."""
    begun = started(run)
    cursors = []
    for stream, paths in find_streams(run.store, wanted, pool=pool).items():
        if wanted.since is None or not _over_before(run, stream.attempt, wanted.since - SKEW_S):
            cursors.append(cursor := Cursor(run.store, stream, paths, wanted))
            cursor.last = begun.get(stream.attempt, "")
    if n is not None:
        by_source: dict[str, list[Cursor]] = {}
        for cursor in cursors:
            by_source.setdefault(cursor.stream.source, []).append(cursor)
        for _ in pool.map(functools.partial(_to_last_lines, n=n), by_source.values()):
            pass
    elif wanted.since is not None:
        for _ in pool.map(_to_time, cursors):
            pass
    return cursors


def _over_before(run: Run, attempt: int, moment: float) -> bool:
    known = run.by_number.get(attempt)
    return known is not None and known.end is not None and known.end.time < moment


def _to_last_lines(cursors: list[Cursor], n: int) -> None:
    """Of one rank: older attempts give what newer ones lack."""
    matches = log_positions.matcher(cursors[0].wanted.pattern)
    for cursor in reversed(cursors):
        (cursor.part, cursor.offset), found = log_positions.of_last_lines(cursor.store, cursor.paths, n, matches)
        n -= found
        if cursor.offset:
            before = log_positions.stamp_before(cursor.store, cursor.paths[cursor.part], cursor.offset)
            cursor.last = max(cursor.last, before)


def _to_time(cursor: Cursor) -> None:
    cursor.part, cursor.offset = log_positions.of_time(cursor.store, cursor.paths, cursor.wanted.since_stamp)


def _extend(run: Run, wanted: Selection, cursors: dict[Stream, Cursor], pool: ThreadPoolExecutor) -> None:
    """Take in parts, ranks and attempts that have appeared. An attempt before the last two has nothing to add."""
    newest = max((stream.attempt for stream in cursors), default=0)
    for stream, paths in find_streams(run.store, wanted, newest - 1, pool).items():
        if stream in cursors:
            cursors[stream].paths = paths
        else:
            cursors[stream] = Cursor(run.store, stream, paths, wanted)
