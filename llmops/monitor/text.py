"""Text that others wrote, made fit for a terminal; numbers and times for people."""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime

# Escape sequences: CSI (kept when it is a colour), OSC/DCS and the like up to their terminator, and two-byte ones.
_ESCAPE = re.compile(
    r"(?P<csi>(?:\x1b\[|\x9b)(?P<parameters>[0-?]*)[ -/]*(?P<final>[@-~]))"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_SGR = re.compile(r"[0-9;:]*")


def clean(text: str) -> str:
    """One line without control, escape, bidirectional or invisible characters: safe wherever it is printed."""
    text = _ESCAPE.sub("", text)
    return " ".join("".join(character if _visible(character) else " " for character in text).split(" ")).strip()


def clean_lines(text: str) -> list[str]:
    """Lines as a terminal would have left them, each cleaned; indentation stays."""
    return [_printable(last_state(line)).rstrip() for line in _ESCAPE.sub("", text).split("\n")]


def terminal_line(line: str) -> str:
    """A line of program output for a terminal: colours stay and are ended, every other escape sequence goes."""
    kept: list[str] = []
    end = 0
    coloured = False
    for match in _ESCAPE.finditer(line):
        kept.append(_printable(line[end : match.start()]))
        end = match.end()
        if match["final"] == "m" and _SGR.fullmatch(match["parameters"]):
            kept.append(f"\x1b[{match['parameters']}m")
            coloured = True
    kept.append(_printable(line[end:]))
    return "".join(kept) + ("\x1b[0m" if coloured else "")


def last_state(line: str) -> str:
    """What a progress bar left on its line: the text after the last carriage return that something followed."""
    return line.rstrip("\r").rsplit("\r", 1)[-1]


def _printable(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _visible(character) else "" for character in text.expandtabs(8))


def _visible(character: str) -> bool:
    """Neither control (Cc), format (Cf: bidirectional overrides among them), surrogate (Cs) nor a line separator."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def duration(seconds: float) -> str:
    """``42s``, ``3m``, ``5h 20m``, ``2d 4h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes}m"
    if days == 0:
        return f"{hours}h {minutes % 60}m"
    return f"{days}d {hours % 24}h"


def moment(epoch: float | None) -> str:
    """Local date and time; a dash for none."""
    if epoch is None:
        return "-"
    return datetime.fromtimestamp(epoch, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def number(value: float | None) -> str:
    """Four digits of a loss; a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def count(value: float | None) -> str:
    """Three digits of a large number: ``980``, ``12.3k``, ``1.2M``; a dash for none."""
    if value is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def percent(value: float | None) -> str:
    """A share of one, in percent; a dash for none."""
    if value is None:
        return "-"
    if 0 < value < 0.001:
        return "<0.1%"
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"
