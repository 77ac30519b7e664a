"""Serves the dashboard until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from llmops.dashboard.app import build
from llmops.dashboard.hub import Hub
from llmops.dashboard.source import Source
from llmops.errors import UserError
from llmops.monitor.feed import leave

LEAVE_S = 2.0  # for answers under way, and for threads that read a store, when the server ends
BACKLOG = 256


@dataclass(frozen=True)
class Options:
    """``url``: the run store. ``shown``: the token is new, and printed. ``token``: None where none is needed."""

    url: str
    host: str
    port: int
    interval_s: float
    token: str | None = None
    shown: bool = False
    allow_actions: bool = False


class _Server(uvicorn.Server):
    """Signals are handled here: uvicorn would pass them on, and a page that is left would end with a failure."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(options: Options) -> None:
    """Print the page's address, and serve it until SIGTERM or Ctrl-C. Raises :class:`UserError` for a port in use."""
    listening = _listen(options.host, options.port)
    port = listening.getsockname()[1]
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host  # noqa: S104
    secret = f"#token={options.token}" if options.token and options.shown else ""
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/{secret}", flush=True)
    asyncio.run(_serve(options, listening))
    leave(LEAVE_S)


async def _serve(options: Options, listening: socket.socket) -> None:
    hub = Hub(Source(options.url).rows, options.interval_s)
    app = build(Source(options.url), hub, options.token, options.allow_actions)
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=int(LEAVE_S),
    )
    server = _Server(config)

    def end() -> None:
        server.force_exit = server.should_exit  # a second time: now
        server.should_exit = True
        hub.close()  # streams never end by themselves

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await server.serve(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise UserError(f"{where}: {error.strerror or error}; give another port, or 0 for a free one") from error
    return listening
