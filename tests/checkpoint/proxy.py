"""A proxy in front of a real S3 server that can do to every request what networks and overloaded servers do.

It runs in a thread of the test; what it does is set by assigning to :attr:`Proxy.faults` at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

CHUNK = 64 << 10
START_S = 10.0
LOOK_S = 0.02  # between looks whether the faults have changed
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

UNAVAILABLE = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ServiceUnavailable</Code><Message>Please reduce your load.'
    b"</Message></Error>"
)


@dataclass(frozen=True)
class Faults:
    """What happens to requests. Everything that is not said goes through unharmed."""

    match: str = ""  # regular expression for "METHOD /path?query": only these are touched
    share: float = 1.0  # of these, how many; the others go through
    first: int | None = None  # of these, only so many
    refuse: bool = False  # 503, without a look at the body
    reset_after: int | None = None  # RST after so many bytes of the request's body
    swallow: bool = False  # read it all, pass nothing on, never answer
    ignore: bool = False  # do not even read the request's body, never answer
    lose_answer: bool = False  # the server does it, and the client sees its connection reset
    cut_answer: int | None = None  # RST after so many bytes of the answer's body
    hold: bool = False  # wait until the faults change, then go on
    late: bool = (
        False  # take all of it, and pass it on when the faults change, whether the client is still there or not
    )
    rate: float | None = None  # bytes per second, of all connections together


@dataclass
class _Request:
    method: str
    target: str
    head: bytes
    length: int
    expects: bool


@dataclass
class Proxy:
    """``url`` is what clients connect to. ``seen`` has "METHOD /path" of every request, in order of arrival."""

    upstream: str
    tls: ssl.SSLContext | None = None
    url: str = ""
    seen: list[str] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    hits: int = 0  # requests that the present faults, and those before, have touched
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def count(self, pattern: str) -> int:
        """Requests so far that the pattern matches."""
        return sum(bool(re.search(pattern, each)) for each in list(self.seen))

    def __post_init__(self) -> None:
        self.taken: list[str] = []  # requests that will be delivered late
        self.delivered: list[str] = []  # and have been
        self._counted = (self.faults, 0)

    # --- everything below runs in the proxy's own thread ------------------------------------------------------------

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""
        self._free_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)  # what is not passed on stays with the client
        listening.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(self._accept, sock=listening, limit=2 * CHUNK, ssl=self.tls)
        scheme = "http" if self.tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready()
        await stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        up: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        try:
            async for request in _requests(reader):
                self.seen.append(f"{request.method} {request.target}")
                if not await self._handle(request, reader, writer, up):
                    break
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            for _, other in up:
                other.transport.abort()
            writer.transport.abort()
            self._tasks.discard(task)

    def _faults(self, request: _Request) -> Faults:
        faults = self.faults
        if faults != self._counted[0]:
            self._counted = (faults, 0)
        if not re.search(faults.match, f"{request.method} {request.target}") or self.random.random() >= faults.share:
            return Faults()
        if faults.first is not None and self._counted[1] >= faults.first:
            return Faults()
        self._counted = (faults, self._counted[1] + 1)
        self.hits += faults != Faults()
        return faults

    async def _handle(
        self,
        request: _Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
    ) -> bool:
        """Do one request; returns whether the connection can be used for another."""
        faults = self._faults(request)
        if faults.late:
            await self._deliver_late(request, reader, writer, faults)
            return False
        if faults.swallow and request.expects:
            writer.write(CONTINUE)
        while (faults.hold or faults.ignore or faults.swallow) and self.faults is faults:
            if faults.swallow and not reader.at_eof():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(CHUNK), LOOK_S)
            else:
                await asyncio.sleep(LOOK_S)
        if faults.ignore or faults.swallow:
            return False
        if faults.refuse:
            head = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(UNAVAILABLE) + (b"" if request.method == "HEAD" else UNAVAILABLE))
            await writer.drain()
            writer.write_eof()
            with contextlib.suppress(TimeoutError):  # a reset would take the answer away again
                while await asyncio.wait_for(reader.read(CHUNK), 1.0):
                    pass
            return False
        if not up:
            address = urlsplit(self.upstream)
            up.append(await asyncio.open_connection(address.hostname, address.port, limit=2 * CHUNK))
        from_server, to_server = up[0]
        to_server.write(request.head)
        body = asyncio.ensure_future(self._pass(reader, to_server, request.length, faults.reset_after, faults.rate))
        answer = asyncio.ensure_future(self._answer(request, from_server, writer, faults))
        try:
            await asyncio.wait({body, answer}, return_when=asyncio.FIRST_COMPLETED)
            if body.done() and body.exception() is not None:
                answer.cancel()
                body.result()
            reuse = await answer
            return reuse and body.done()  # else it was refused before all was sent
        except _CutError:
            _reset(writer)
            return False
        finally:
            body.cancel()
            answer.cancel()
            await asyncio.gather(body, answer, return_exceptions=True)

    async def _deliver_late(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Faults
    ) -> None:
        if request.expects:
            writer.write(CONTINUE)
        body = await reader.readexactly(request.length)
        self.taken.append(f"{request.method} {request.target}")
        while self.faults is faults:
            await asyncio.sleep(LOOK_S)
        address = urlsplit(self.upstream)
        from_server, to_server = await asyncio.open_connection(address.hostname, address.port)
        to_server.write(request.head + body)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await from_server.readuntil(b"\r\n\r\n")
            self.delivered.append(f"{request.method} {request.target}")
        to_server.transport.abort()

    async def _answer(
        self, request: _Request, server: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Faults
    ) -> bool:
        while True:
            head = await server.readuntil(b"\r\n\r\n")
            status, headers = int(head.split(b" ", 2)[1]), _headers(head)
            if status >= 200:
                break
            writer.write(head)
        if faults.lose_answer:
            raise _CutError
        writer.write(head)
        await writer.drain()
        if request.method == "HEAD" or status in (204, 304):
            pass
        elif "chunked" in headers.get("transfer-encoding", ""):
            while True:
                line = await server.readuntil(b"\r\n")
                writer.write(line)
                size = int(line.split(b";")[0], 16)
                await self._pass(server, writer, size + 2, None, faults.rate)
                if not size:
                    break
        else:
            await self._pass(server, writer, int(headers.get("content-length", "0")), faults.cut_answer, faults.rate)
        return headers.get("connection", "").lower() != "close"

    async def _pass(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        length: int,
        cut_after: int | None,
        rate: float | None,
    ) -> None:
        """Pass ``length`` bytes on, and raise _CutError after the first ``cut_after``."""
        done = 0
        while done < length:
            if cut_after is not None and done >= cut_after:
                raise _CutError
            data = await source.read(min(CHUNK, length - done))
            if not data:
                raise asyncio.IncompleteReadError(b"", length - done)
            done += len(data)
            if rate:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + len(data) / rate
                await asyncio.sleep(self._free_at - now)
            target.write(data)
            await target.drain()


class _CutError(Exception):
    pass


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[_Request]:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        headers = _headers(head)
        assert "chunked" not in headers.get("transfer-encoding", ""), "clients here say how much they send"
        length, expects = int(headers.get("content-length", "0")), "expect" in headers
        yield _Request(method, unquote(target), head, length, expects)


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def proxy(upstream: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A running proxy in front of ``upstream``, an URL; with ``tls`` it is reached by HTTPS."""
    made, ready = Proxy(upstream, tls), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(made.serve(ready.set, stop))

    thread = threading.Thread(target=run, name="proxy", daemon=True)
    thread.start()
    assert ready.wait(START_S), "the proxy did not start"
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(START_S)
        assert not thread.is_alive(), "the proxy did not stop"
        loop.close()
