"""What a program said last before it failed: a Python traceback in its output, or lines that look like an error.

Pure: works on lines. Several processes may have written at the same time, so that lines of others stand in between.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

HEADER = "Traceback (most recent call last):"
CHAINS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
MESSAGE_LINES = 60  # of an exception, after its first
MESSAGE_S = 2.0  # a line that comes so much later is no part of it
STRANGERS = 200  # lines in a row, of others, between two of a traceback
CHAIN_GAP = 50  # lines of others between an exception and the next of its chain
LOOK_BACK = 200  # lines in which an error is looked for where there is no traceback
FEW, MANY = 20, 2000  # lines after a traceback: it is the end all the same; it cannot be the end
SOON_S = 60.0  # between an exception and the end of its program
CONTEXT = 30  # lines that are shown of those
# An exception's line is "module.Name: message", "Name:" or "Name". What ends like an exception surely is one.
_SURE = re.compile(
    r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*"
    r"(?:Error|Exception|Interrupt|Exit|Iteration|Expired|Warning|Failure|Timeout|Exhausted|Died|OutOfMemory|Group)"
    r"(?::(?:\s.*)?)?"
)
_PERHAPS = re.compile(r"(?!(?:INFO|DEBUG|WARN|ERROR|CRITICAL|FATAL)\b)(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?::(?:\s.*)?)?")
_LOOKS_WRONG = re.compile(
    r"\b(?:\w*error|\w*exception|fatal|panic(?:ked)?|abort(?:ed)?|killed|terminate called|segmentation fault|"
    r"core dumped|out of memory|oom|bus error|illegal instruction|assert(?:ion)?|traceback|cannot|could not|"
    r"failed|failure|no such file|not found|permission denied)\b",
    re.IGNORECASE,
)
# What a rank dies of because another one has: its peers are gone, or it was told to go.
_SECONDARY = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|ncclRemoteError|ncclSystemError|remote process exited|"
    r"NCCL (?:watchdog|communicator was aborted)|collective operation timeout|"
    r"Connection (?:closed|reset|refused)|Connection(?:Reset|Aborted|Refused)Error|BrokenPipeError|Broken pipe|"
    r"(?i:gloo.*(?:closed|reset|time[dr ]*out|connect))|TCPStore|Socket Timeout|ChildFailedError|"
    r"KeyboardInterrupt|SIGTERM|SIGKILL|SIGINT|\bTerminated\b"
)


@dataclass(frozen=True)
class Line:
    """A line of output, and when it was stored in epoch seconds."""

    text: str
    time: float | None = None


@dataclass(frozen=True)
class Failure:
    """What was found. ``first`` and ``last`` are indices of lines, both included."""

    kind: str  # "traceback", "message" (lines that look like an error), or "end" (the last lines, whatever they say)
    first: int
    last: int
    title: str  # of a traceback: its last exception; otherwise the line that looks like an error
    secondary: bool  # it tells of the end of another process
    time: float | None  # of its beginning
    picked: tuple[int, ...] = ()  # of a traceback among lines of others: those that belong to it


def find(lines: Sequence[Line]) -> Failure | None:
    """The failure that ended a program which wrote ``lines``; None when it wrote nothing.

    The last traceback, unless that only tells of the end of others, or of an exception that Python ignored, right
    after one of its own. A traceback after which the program went on for long was survived, and is none.
    """
    found = [each for each in tracebacks(lines) if _at_the_end(each, lines)]
    for newest in reversed(found):
        if newest.secondary:
            earlier = [each for each in found if not each.secondary and _near(each.time, newest.time)]
            return earlier[-1] if earlier else newest
        return newest
    return _message(lines)


def tracebacks(lines: Sequence[Line]) -> list[Failure]:
    """All tracebacks, in order; exceptions of one chain are one."""
    found: list[Failure] = []
    index = 0
    while index < len(lines):
        if HEADER not in lines[index].text:
            index += 1
            continue
        failure = _traceback(lines, index)
        found.append(failure)
        index = failure.last + 1
    return found


def _traceback(lines: Sequence[Line], start: int) -> Failure:
    """The traceback whose header is at ``start``, with all of its chain."""
    titles: list[str] = []
    picked: list[int] = []
    index: int | None = start
    while index is not None:
        members, title = _one(lines, index)
        picked += members
        titles.append(title)
        index = _chained(lines, members[-1], picked)
    ignored = start > 0 and lines[start - 1].text.startswith("Exception ignored in")
    root = titles[0] or titles[-1]
    return Failure(
        kind="traceback",
        first=picked[0],
        last=picked[-1],
        title=titles[-1] or titles[0],
        secondary=ignored or _SECONDARY.search(root) is not None,
        time=lines[start].time,
        picked=tuple(picked),
    )


def _one(lines: Sequence[Line], start: int) -> tuple[list[int], str]:
    """Indices of the lines of one exception, and its own line; empty where that was never written."""
    before = lines[start].text.split(HEADER, 1)[0].removesuffix("Original ")
    group = before.endswith("+ Exception Group ")
    # PyTorch puts "[rank3]: " before each line; a logger puts its words before the first one alone.
    prefix = f"{words} " if (words := before.removesuffix("+ Exception Group ").strip()) else ""
    if start + 1 == len(lines) or not lines[start + 1].text.startswith(prefix):
        prefix = ""
    members, strangers, last_body = [start], 0, start
    title = ""
    for index in range(start + 1, len(lines)):
        text = lines[index].text
        if prefix and text.startswith(prefix):
            text = text[len(prefix) :]
        elif prefix:
            strangers += 1
            if strangers > STRANGERS:
                break
            continue
        if text[:1] in (" ", "\t") or HEADER in text:
            if group and not title and text.startswith("  | ") and _exception(text[4:]):
                title = text[4:]
            members.append(index)
            last_body, strangers = index, 0
            continue
        if group:
            break
        if _exception(text, sure=not _goes_on(lines, index, prefix)):
            members.append(index)
            return _with_message(lines, members, prefix), text
        strangers += 1
        if strangers > STRANGERS:
            break
    return [index for index in members if index <= last_body], title


def _exception(text: str, sure: bool = True) -> bool:
    """Whether the line is an exception's. ``sure``: the traceback has ended, so that any name may be one."""
    return _SURE.fullmatch(text) is not None or (sure and _PERHAPS.fullmatch(text) is not None)


def _goes_on(lines: Sequence[Line], index: int, prefix: str) -> bool:
    """Whether calls of this traceback, or what surely is its exception, follow soon: the line is somebody else's."""
    for distance, line in enumerate(lines[index + 1 : index + 21]):
        text = line.text.removeprefix(prefix)
        if HEADER in text:
            return False
        if text.startswith('  File "') or (distance < 5 and _SURE.fullmatch(text)):
            return True
    return False


def _with_message(lines: Sequence[Line], members: list[int], prefix: str) -> list[int]:
    """The exception may say more than one line."""
    at = members[-1]
    for index in range(at + 1, min(at + 1 + MESSAGE_LINES, len(lines))):
        line = lines[index]
        text = line.text
        if prefix and not text.startswith(prefix):
            continue
        text = text.removeprefix(prefix)
        late = (line.time or 0.0) - (lines[at].time or 0.0) > MESSAGE_S
        if late or not text.strip() or HEADER in text or text.startswith(CHAINS):
            break
        members.append(index)
    return members


def _chained(lines: Sequence[Line], end: int, picked: list[int]) -> int | None:
    """Where the next exception of the chain begins, if there is one. Its words in between are picked, too."""
    said: int | None = None
    for index in range(end + 1, min(end + 1 + CHAIN_GAP, len(lines))):
        text = lines[index].text
        if any(words in text for words in CHAINS):
            said = index
        elif HEADER in text:
            if said is None and f"Original {HEADER}" not in text:
                return None
            if said is not None:
                picked.append(said)
            return index
    return None


def _at_the_end(failure: Failure, lines: Sequence[Line]) -> bool:
    """Whether the program ended soon after, or said next to nothing any more: its last words may come from a thread."""
    after = len(lines) - 1 - failure.last
    return after <= FEW or (_near(failure.time, lines[-1].time) and after <= MANY)


def _near(one: float | None, other: float | None) -> bool:
    return one is None or other is None or abs(other - one) <= SOON_S


def _message(lines: Sequence[Line]) -> Failure | None:
    """The last line that looks like an error, or else the last one that says anything."""
    said = [index for index in range(len(lines)) if lines[index].text.strip()]
    if not said:
        return None
    wrong = [
        index
        for index in said[-LOOK_BACK:]
        if (index >= len(lines) - CONTEXT or _near(lines[index].time, lines[-1].time))
        and _LOOKS_WRONG.search(lines[index].text)
    ]
    at = wrong[-1] if wrong else said[-1]
    return Failure(
        kind="message" if wrong else "end",
        first=max(0, min(at, len(lines) - CONTEXT)),
        last=len(lines) - 1,
        title=lines[at].text.strip(),
        secondary=_SECONDARY.search(lines[at].text) is not None,
        time=lines[at].time,
    )


def text_of(failure: Failure, lines: Sequence[Line]) -> list[str]:
    """The lines of the failure, those of others between them left out."""
    indices = failure.picked or range(failure.first, failure.last + 1)
    return [lines[index].text for index in indices]
