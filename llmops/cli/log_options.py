"""Options of ``llmops logs``, as text."""

from __future__ import annotations

import fnmatch
import re
import warnings
from dataclasses import dataclass
from datetime import datetime
from datetime import time as time_of_day

from llmops.errors import UserError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Ranks:
    """Numbers and ranges: membership alone, since ``0-999999999`` is a range, too."""

    spans: tuple[range, ...]

    def __contains__(self, rank: object) -> bool:
        return any(rank in span for span in self.spans)


@dataclass(frozen=True)
class Nodes:
    """Names and patterns with ``*`` and ``?``."""

    patterns: tuple[str, ...]

    def __contains__(self, node: object) -> bool:
        return isinstance(node, str) and any(fnmatch.fnmatchcase(node, pattern) for pattern in self.patterns)


def ranks(text: str) -> int | Ranks | None:
    """``all``, a number, or ``0,3,8-15``."""
    if text == "all":
        return None
    if text.isdecimal() and text.isascii():
        return int(text)
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--rank {text}: give a rank's number, or all; several as 0,3,8-15")
        spans.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return Ranks(tuple(spans))


def since(text: str, now: float) -> float:
    """Epoch seconds of ``10m`` ago, or of a date and time, local unless it has a zone."""
    if match := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhdw])", text):
        return max(0.0, now - float(match[1]) * _UNITS[match[2]])
    try:
        if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?", text):
            today = datetime.fromtimestamp(now).astimezone().date()
            clock = f"{'0' if text[1] == ':' else ''}{text}"
            return datetime.combine(today, time_of_day.fromisoformat(clock)).timestamp()
        return max(0.0, datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(
            f"--since {text}: give a span as 10m, 2h or 1d, a time of today as 14:30, or a date as 2026-11-23T14:30"
        ) from error


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python will read otherwise
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--grep {text}: not a regular expression: {error}") from error
