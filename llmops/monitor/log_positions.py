"""Where to begin to read a stream of output: at its last lines, or at a time. Reads no more than it must."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from llmops.agent.output import STAMP
from llmops.monitor.text import last_state
from llmops.runs.store import Store

BLOCK = 1 << 16
MAX_TAIL = 1 << 23  # of one line: what is before a longer one is not looked for
PEEK = 1 << 12
SEARCH = 1 << 20  # without any stamp, and the file counts as one without
_STAMPED = re.compile(rb"(?:\n|\A)\0*(" + STAMP.pattern[:-1] + rb") ")

Matches = Callable[[bytes], bool]
Position = tuple[int, int]  # part, and offset in it


def matcher(pattern: re.Pattern[str] | None) -> Matches | None:
    """Whether a stored line matches: as it is shown, without its time. None for no pattern: all do."""
    if pattern is None:
        return None

    def matches(line: bytes) -> bool:
        line = line.lstrip(b"\0")
        found = STAMP.match(line)
        text = line[found.end() if found else 0 :].decode("utf-8", "replace")
        return pattern.search(last_state(text)) is not None

    return matches


def of_last_lines(store: Store, paths: Sequence[str], n: int, matches: Matches | None) -> tuple[Position, int]:
    """Where the last ``n`` lines that match begin, and how many there are."""
    part, offset, left = len(paths) - 1, _size(store, paths[-1]), n
    for index in range(len(paths) - 1, -1, -1):
        if left == 0:
            break
        begin, found = _last_lines(store, paths[index], left, matches)
        if found:
            part, offset = index, begin
            left -= found
    return (part, offset), n - left


def of_time(store: Store, paths: Sequence[str], since: str) -> Position:
    """Where to read from so that no line from ``since`` on, a stamp, is missed; not much before there."""
    low, high = 0, len(paths)
    while high - low > 1:
        middle = (low + high) // 2
        found = _first_stamp(store, paths[middle], 0, PEEK)
        if found is not None and found[1] < since:
            low = middle
        else:
            high = middle
    part, path = low, paths[low]
    low, high = 0, _size(store, path)
    while high - low > BLOCK:
        middle = (low + high) // 2
        found = _first_stamp(store, path, middle, high)
        if found is not None and found[1] < since:
            low = found[0]
        else:
            high = middle
    return part, low


def stamp_before(store: Store, path: str, offset: int) -> str:
    """The stamp of the line at ``offset``, or else of the nearest one before it; empty when none is near."""
    begin = max(0, offset - PEEK)
    try:
        data = store.read(path, begin, offset + 25)  # no further than the stamp of the line itself
    except FileNotFoundError:
        return ""
    found = [match[1] for match in _STAMPED.finditer(data) if match.start() or not begin]
    return found[-1].decode() if found else ""


def backwards(store: Store, path: str) -> Iterator[tuple[int, bytes]]:
    """Offset and text of each line without its newline, the last first."""
    size = end = _size(store, path)
    rest = b""
    while end > 0:
        start = max(0, end - BLOCK)
        data = store.read(path, start, end)
        if end == size:
            data = data.removesuffix(b"\n")  # it ends the last line
        data += rest
        stop = len(data)
        while (cut := data.rfind(b"\n", 0, stop)) >= 0:
            yield start + cut + 1, data[cut + 1 : stop]
            stop = cut
        rest, end = data[:stop], start
        if len(rest) >= MAX_TAIL:
            yield end, rest
            return
    if size:
        yield 0, rest


def _last_lines(store: Store, path: str, n: int, matches: Matches | None) -> tuple[int, int]:
    offset = found = 0
    for begin, line in backwards(store, path):
        if matches is None or matches(line):
            offset, found = begin, found + 1
            if found == n:
                break
    return offset, found


def _first_stamp(store: Store, path: str, start: int, end: int) -> tuple[int, str] | None:
    """Offset and stamp of the first stamped line that begins in a range."""
    data = b""
    while len(data) < min(end - start, SEARCH):
        at = start + len(data)
        try:
            more = store.read(path, at, min(end, at + PEEK + len(data)))
        except FileNotFoundError:
            return None
        if not more:
            return None
        data += more
        for match in _STAMPED.finditer(data):
            if start == 0 or data[match.start()] == ord("\n"):  # elsewhere the range begins inside of a line
                return start + match.start(1), match[1].decode()
    return None


def _size(store: Store, path: str) -> int:
    """Of what is no file: 0. Who reads it says so."""
    try:
        return store.size(path)
    except FileNotFoundError:
        return 0
