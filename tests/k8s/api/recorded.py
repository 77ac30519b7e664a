"""The recordings of a real API server."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data" / "recordings"


@functools.cache
def _file(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


def answer(name: str) -> dict[str, Any]:
    """``{note, as, request, status, headers, body | body_text | chunks}`` of a recording."""
    return next(file[name] for file in map(_file, ("answers", "workloads", "pods", "events", "logs")) if name in file)


def body(name: str) -> dict[str, Any]:
    """The JSON of an answer."""
    return dict(answer(name)["body"])


def items(name: str) -> list[dict[str, Any]]:
    """Of a list."""
    return list(body(name)["items"])


def watched(name: str) -> dict[str, Any]:
    """``{note, path, status, events, end}`` of a watch."""
    return dict(_file("watches")[name])


def raw(name: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, to be sent once more."""
    told = answer(name)
    text = json.dumps(told["body"]) if "body" in told else told.get("body_text") or ""
    return told["status"], dict(told["headers"]), text.encode()
