"""Ranges of S3 objects, from the socket into memory that is there already, by as many threads as ask for them.

s3fs receives everything in one thread, and copies it several times on its way. Here it signs the request, and no more.
What is not the plain answer to that is left to s3fs, which knows what it means.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llm.utils.storage import rest

EXPIRES_S = 900  # of a signature; it is used again for other ranges of the object for half as long
IDLE = 16  # connections that are kept
SIGNED = 1024  # signatures that are kept
ORDINARY = (404, 416)  # answers that say nothing about how to ask; after others only s3fs is asked
CONNECT_S = 5.0


class Downloads:
    """Connections to one store. Safe to use in threads."""

    def __init__(self, fs: Any) -> None:
        # Until it turns out that only s3fs knows how to reach this store. Nothing is signed for strangers.
        self.usable = not getattr(fs, "anon", False)
        self._fs = fs
        self._lock = threading.Lock()
        self._idle: list[tuple[str, http.client.HTTPConnection]] = []
        self._signed: dict[str, tuple[float, str]] = {}  # key -> (until when, URL)
        self._tls: ssl.SSLContext | None = None

    def signed(self, key: str) -> str | None:
        """The URL that :meth:`sign` made for ``key`` before."""
        until, url = self._signed.get(key, (0.0, ""))
        return url if time.monotonic() < until else None

    async def sign(self, key: str) -> str:
        """A URL that gives the right to read ``key`` for a while."""
        url: str = await self._fs._url(key, expires=EXPIRES_S)
        if self.usable and not self._plain(url):
            self.usable = False
        with self._lock:
            if len(self._signed) >= SIGNED:
                self._signed.clear()
            self._signed[key] = time.monotonic() + EXPIRES_S / 2, url
        return url

    def fetch(
        self, url: str, start: int, buffers: Sequence[memoryview], stall_s: float, limit: float | None
    ) -> int | None:
        """Fill ``buffers`` with the bytes from ``start`` on; returns how many there were, or None: ask s3fs.

        Raises OSError or HTTPException when another try may work, as when no byte comes for ``stall_s``; TimeoutError
        also at the time ``limit``.
        """
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc}"
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        wanted = sum(map(len, buffers))
        try:
            connection, answer = self._request(place, target, start, wanted, _wait_s(stall_s, limit))
        except ssl.SSLCertVerificationError:  # s3fs may know other authorities
            self.usable = False
            return None
        done = 0
        try:
            if answer.status >= 500 or answer.status == 429:
                raise OSError(f"{answer.status} {answer.reason}")
            if answer.status != 206 or answer.length is None or answer.length > wanted:
                self.usable = self.usable and answer.status in ORDINARY
                return None
            size, left = answer.length, rest(buffers, 0)
            while done < size:
                connection.sock.settimeout(_wait_s(stall_s, limit))
                # What has come so far: a plain `readinto` would wait until there is no more, however slowly it comes.
                if not (count := answer.fp.readinto1(left[0][: size - done])):
                    raise ConnectionError(f"the connection was closed after {done} of {size} bytes")
                done += count
                left = rest(left, count)
            return done
        finally:
            answer.close()
            if done and done == answer.length and not answer.will_close:
                self._keep(place, connection)
            else:
                connection.close()

    def _request(
        self, place: str, target: str, start: int, size: int, wait_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Ask; on a new connection if the store has closed the old one meanwhile."""
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        while True:
            connection, used = self._take(place)
            try:
                if not used:
                    connection.timeout = min(wait_s, CONNECT_S)
                    connection.connect()
                connection.sock.settimeout(wait_s)
                connection.request("GET", target, headers=headers)
                return connection, connection.getresponse()
            except (http.client.HTTPException, ConnectionError):
                connection.close()
                if not used:
                    raise
            except BaseException:
                connection.close()
                raise

    def _take(self, place: str) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it has been used before."""
        with self._lock:
            for index in reversed(range(len(self._idle))):
                if self._idle[index][0] == place:
                    return self._idle.pop(index)[1], True
        scheme, _, host = place.partition("://")
        if scheme == "http":
            return http.client.HTTPConnection(host), False
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=_authorities())
        return http.client.HTTPSConnection(host, context=self._tls), False

    def _keep(self, place: str, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < IDLE:
                self._idle.append((place, connection))
                return
        connection.close()

    def _plain(self, url: str) -> bool:
        """Is the store reached without proxies, certificates of ours, or extra headers?"""
        options = {**(self._fs.client_kwargs or {}), **(self._fs.config_kwargs or {})}
        special = any(options.get(name) for name in ("proxies", "proxies_config", "client_cert"))
        parts = urlsplit(url)
        proxied = parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")
        return not (special or options.get("verify") is not None or self._fs.req_kw or proxied)


def _authorities() -> str | None:
    return os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")


def _wait_s(stall_s: float, limit: float | None) -> float:
    if limit is None:
        return stall_s
    if (left := limit - time.monotonic()) <= 0:
        raise TimeoutError("it was not done in time")
    return min(stall_s, left)
