"""Who may see the page: everybody on loopback, holders of the token elsewhere; and what browsers may do with it."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmops.dashboard import encode
from llmops.errors import UserError

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
MIN_TOKEN = 16  # characters: what people make up and what is shorter can be guessed


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine alone. Raises :class:`UserError`."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: this machine knows no such address ({error}); give one of its own") from error
    return all(ipaddress.ip_address(str(each[4][0]).split("%")[0]).is_loopback for each in found)


def new_token() -> str:
    """Cannot be guessed."""
    return secrets.token_urlsafe(24)


def check_token(token: str, where: str) -> str:
    """The token without the newline that its file ends with. Raises :class:`UserError` when it can be guessed."""
    token = token.strip()
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{where}: a token is one word of at least {MIN_TOKEN} ASCII characters; make a longer one")
    return token


@dataclass(frozen=True)
class Guard:
    """Refuses those who may not, and adds the headers that keep the page apart from other pages.

    Without a token the Host header must name loopback: a foreign page whose name was made to point here (DNS
    rebinding) brings its own name. Its port is not looked at, for one that is forwarded through SSH is another one.
    The token is a header that only the page itself can send, not a cookie, which browsers would send to all ports of
    this machine and on behalf of other pages.
    """

    app: ASGIApp
    token: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        api = scope["path"].startswith("/api/")

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("cache-control", "no-store" if api else "no-cache")
            await send(message)

        refused = self._refused(scope["method"], Headers(scope=scope), api)
        await (refused or self.app)(scope, receive, guarded)

    def _refused(self, method: str, headers: Headers, api: bool) -> Response | None:
        host = headers.get("host", "")
        if self.token is None and not names_loopback(host):
            return refusal(403, f"this page is for its own machine: it was asked for as {host or 'nothing'}")
        if method not in ("GET", "HEAD") and not same_origin(headers, host):
            return refusal(403, "another page cannot do this")
        if self.token is not None and api and not holds(headers, self.token):
            return refusal(401, "the token is missing or wrong", {"www-authenticate": "Bearer"})
        return None


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON that says why there is no other."""
    return Response(encode.error(message), status, headers, "application/json")


def names_loopback(host: str) -> bool:
    """Whether a Host header names this machine's loopback, at any port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def same_origin(headers: Headers, host: str) -> bool:
    """Whether a request that changes something comes from our page, or from no page at all."""
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site", "same-origin")
    return (origin is None or urlsplit(origin).netloc == host) and site in ("same-origin", "none")


def holds(headers: Headers, token: str) -> bool:
    """Compared in a time that tells nothing of where they differ."""
    given = headers.get("authorization", "").removeprefix("Bearer ")
    return secrets.compare_digest(given.encode("utf-8", "replace"), token.encode())
