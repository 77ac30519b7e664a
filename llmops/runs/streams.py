"""Streams in a run directory: numbered parts of lines. The last part may still grow; the others never change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from llmops.runs.store import Store

BLOCK = 1 << 16


def parts(store: Store, folder: str, stem: str, suffix: str) -> list[str]:
    """Paths of ``<folder>/<stem>NNNNNN<suffix>``, oldest first."""
    pattern = re.compile(re.escape(stem) + r"(\d{6,})" + re.escape(suffix))
    numbered = [(int(match[1]), name) for name in store.list(folder) if (match := pattern.fullmatch(name))]
    return [f"{folder}/{name}" for _, name in sorted(numbered)]


def lines_backwards(store: Store, path: str) -> Iterator[bytes]:
    """Lines of an object without their newline, the last first, reading a block at a time.

    Where the object does not end in a newline, the first that comes is its unfinished line; otherwise it is empty.
    """
    end = store.size(path)
    rest = b""
    while end > 0:
        start = max(0, end - BLOCK)
        first, *lines = (store.read(path, start, end) + rest).split(b"\n")
        yield from reversed(lines)
        rest, end = first, start
    yield rest


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for what is not whole, or is none."""
    if not line:
        return None
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            record = json.loads(line)  # takes the NaN and Infinity that Python's own writer makes
        except ValueError:
            return None
    return record if isinstance(record, dict) else None
