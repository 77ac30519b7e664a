"""Bodies of answers, and errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from llm.inference.openai_types import Refused


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def json_answer(data: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def refusal(refused: Refused) -> Response:
    """What is said instead of a text."""
    headers = {} if refused.retry_s is None else {"Retry-After": str(refused.retry_s)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    return json_answer(refused.body(), refused.status, headers)


def http_error(_: Request, error: Exception) -> Response:
    """Of the routes: no such path, or no such method."""
    assert isinstance(error, HTTPException)
    return json_answer(Refused(error.status_code, error.detail).body(), error.status_code, dict(error.headers or {}))


def broken(_: Request, error: Exception) -> Response:
    """An error of ours; the trace is logged."""
    return refusal(Refused(500, f"the server failed: {type(error).__name__}", code="internal_error"))
