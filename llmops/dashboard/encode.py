"""Answers as JSON that every browser can read, whatever runs and programs have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

RECENT = 32  # losses of a row's spark line
# A row of the list does without these; the page of the run has them.
_DETAILS = ("attempts", "recent_losses", "error")


def encode(value: Any) -> bytes:
    """JSON in UTF-8. A number that is not finite becomes null, half of a surrogate pair a question mark."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_whole(value))


def error(message: str) -> bytes:
    """The body of every answer that is none."""
    return encode({"error": " ".join(message.split())})


def row(described: Mapping[str, Any]) -> bytes:
    """A described run as a row of the list: without what only its own page shows."""
    losses = list(described.get("recent_losses") or [])
    most = range(0, len(losses), -(-len(losses) // RECENT)) if losses else range(0)
    return encode(
        {
            **{key: value for key, value in described.items() if key not in _DETAILS},
            "attempts": len(described.get("attempts") or []),
            "recent_losses": [losses[index] for index in most],
        }
    )


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {_whole(key): _whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(each) for each in value]
    return value
