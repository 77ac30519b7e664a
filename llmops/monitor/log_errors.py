"""Why an attempt failed, from the ends of all its ranks' output: which rank was first, and what the others said."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llmops.monitor import tracebacks
from llmops.monitor.log_streams import THREADS, Cursor, LogLine, Selection, Stream, find_streams, started
from llmops.monitor.tracebacks import Failure
from llmops.runs.model import Attempt, AttemptEnd, Run
from llmops.runs.store import Store

TAIL_BYTES = 1 << 18  # of each rank, in which its traceback is looked for
QUIET_BYTES = 1 << 15  # of these, where there is no traceback in them
BEFORE_BYTES = 1 << 16  # of what is before a traceback: it may be the second of a chain
LINE_BYTES = 1 << 9  # before the first of them: the line that says that an exception was ignored
MAX_TITLE = 300
FAILED = ("failed", "hung", "node_failure")
KILLED = (-9, -15, 137, 143)  # what is left of a rank that was ended because another failed
_VARIES = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)*")


@dataclass(frozen=True)
class RankError:
    """How one rank ended. ``text`` is filled in for the cause alone."""

    stream: Stream
    title: str
    kind: str  # "traceback", "message", "end" or "none", which wrote nothing
    secondary: bool
    time: float | None
    exit_code: int | None
    text: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Ranks that ended alike."""

    title: str  # of the first of them
    ranks: list[int]


@dataclass(frozen=True)
class Errors:
    """Why an attempt failed."""

    attempt: int
    end: AttemptEnd | None  # None: nobody recorded it
    cause: RankError | None  # None: no rank wrote anything
    sure: bool  # False: all that is known of the cause is that others lost it, or that it was told to go
    others: list[Group]
    ranks: int  # whose output was looked at


def failed_attempts(run: Run) -> list[Attempt]:
    """Those that failed, and those that have a successor though nobody recorded their end."""
    return [
        attempt
        for attempt in run.attempts
        if (attempt.end is not None and attempt.end.reason in FAILED)
        or (attempt.end is None and attempt is not run.newest)
    ]


def errors(run: Run, attempt: int, wanted: Selection) -> Errors:
    """Why ``attempt`` failed. Of each chosen rank no more than the end of its output is read, and one line kept."""
    known = run.by_number.get(attempt)
    end = known.end if known else None
    wanted = Selection(wanted.ranks, attempt, nodes=wanted.nodes)
    with ThreadPoolExecutor(THREADS) as pool:
        streams = find_streams(run.store, wanted, pool=pool)
        begun = started(run).get(attempt, "")

        def look(stream: Stream) -> RankError:
            return _look(run.store, stream, streams[stream], begun, end)

        # Threads would only stand in each other's way where nothing has to be waited for.
        found = list(pool.map(look, streams) if run.store.local_path is None else map(look, streams))
    if not found:
        return Errors(attempt, end, None, False, [], 0)
    failed_rank = end.failed_rank if end else None

    def rank_first(each: RankError) -> tuple[int, float, bool, Stream]:
        return (
            _order(each, end),
            math.inf if each.time is None else each.time,
            each.stream.rank != failed_rank,
            each.stream,
        )

    cause = min(found, key=rank_first)
    sure = _order(cause, end) < _SECONDARY
    others = [each for each in found if each is not cause and not _ended_well(each)]
    cause = _look(run.store, cause.stream, streams[cause.stream], begun, end, whole=True)
    return Errors(attempt, end, cause, sure, _grouped(others), len(found))


_TRACEBACK, _FAILED_RANK, _MESSAGE, _SECONDARY, _QUIET, _WELL = range(6)


def _order(error: RankError, end: AttemptEnd | None) -> int:
    """What is the likelier cause comes first: a traceback of its own, a death of its own, a death of others' death."""
    failed_rank = end.failed_rank if end else None
    if _ended_well(error):
        return _WELL
    if error.kind == "traceback" and not error.secondary:
        return _TRACEBACK
    if error.stream.rank == failed_rank and not error.secondary:
        return _FAILED_RANK
    if error.exit_code not in KILLED and not error.secondary and error.kind == "message":
        return _MESSAGE
    if error.secondary:
        return _SECONDARY
    return _QUIET


def _ended_well(error: RankError) -> bool:
    return error.exit_code == 0


def _look(
    store: Store, stream: Stream, paths: Sequence[str], begun: str, end: AttemptEnd | None, whole: bool = False
) -> RankError:
    """How one rank ended; with ``whole``, also what it said."""
    lines = _last(store, stream, paths, begun)
    said = [tracebacks.Line(line.text, line.time) for line in lines]
    failure = tracebacks.find(said) or Failure("none", 0, -1, "", False, None)
    exit_code = end.exit_codes.get(str(stream.rank)) if end else None
    return RankError(
        stream=stream,
        title=failure.title[:MAX_TITLE],
        kind=failure.kind,
        secondary=failure.secondary,
        time=failure.time,
        exit_code=exit_code,
        text=tracebacks.text_of(failure, said) if whole else [],
    )


def _last(store: Store, stream: Stream, paths: Sequence[str], begun: str) -> list[LogLine]:
    """The last lines of a stream: as many as a traceback may take, where there is one, and fewer where there is not."""
    data = b""
    for path in reversed(paths):
        missing = TAIL_BYTES - len(data)
        if missing <= 0:
            break
        with contextlib.suppress(FileNotFoundError):  # a folder of that name, or removed just now: there are no lines
            size = store.size(path)
            data = store.read(path, max(0, size - missing), size) + data
    header = tracebacks.HEADER.encode()
    at = data.rfind(header)
    start = len(data) - QUIET_BYTES if at < 0 else data.find(header, max(0, at - BEFORE_BYTES)) - LINE_BYTES
    start = max(0, start)
    # What is cut is at the beginning of this, and is the end of a line whose time is not known.
    start = data.find(b"\n", start) + 1 if start else 0
    cursor = Cursor(store, stream, [])
    cursor.last = begun
    cursor.held = data[start:].removesuffix(b"\n")
    return cursor.rest()


def _grouped(found: Sequence[RankError]) -> list[Group]:
    """Those whose titles differ in numbers alone are one; the largest group first."""
    groups: dict[str, Group] = {}
    for each in found:
        if each.kind in ("traceback", "message") and each.title:
            title = each.title
        elif each.exit_code in KILLED:
            title = "killed, without an error of its own"
        elif each.kind == "none":
            title = "wrote nothing"
        else:
            title = f"last line: {each.title}"
        group = groups.setdefault(_VARIES.sub("#", title), Group(title, []))
        group.ranks.append(each.stream.rank)
    return sorted(groups.values(), key=lambda group: (-len(group.ranks), group.ranks))


def spans(ranks: Sequence[int], most: int = 8) -> str:
    """``0-7, 9``; after ``most`` parts an ellipsis."""
    return ", ".join([*_parts(ranks, most)])


def _parts(ranks: Sequence[int], most: int) -> Iterator[str]:
    ordered = sorted(set(ranks))
    index = count = 0
    while index < len(ordered):
        if count == most:
            yield "…"
            return
        first = index
        while index + 1 < len(ordered) and ordered[index + 1] == ordered[index] + 1:
            index += 1
        yield f"{ordered[first]}-{ordered[index]}" if index > first else str(ordered[first])
        index, count = index + 1, count + 1
