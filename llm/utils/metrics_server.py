"""A small HTTP server for ``/metrics``: read-only pages, each made anew when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from urllib.parse import urlsplit

TEXT = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format
JSON = "application/json"
CLIENT_S = 10.0  # for a client to ask and to take its answer

Page = tuple[str, Callable[[], bytes]]  # its content type, and what makes it


class Server(ThreadingHTTPServer):
    """Serves ``pages`` by path from the moment it is made, on threads that end with the process."""

    daemon_threads = True

    def __init__(self, address: str, port: int, pages: Mapping[str, Page]) -> None:
        """``port``: 0 for a free one. Raises OSError when it cannot be opened."""
        self.address_family = AF_INET6 if ":" in address else AF_INET
        self.pages = dict(pages)
        super().__init__((address, port), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_bind(self) -> None:
        """Without the look-up of this machine's name, on which a broken name service would hang for long."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    def close(self) -> None:
        """Answer nobody any more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_S
    server: Server

    def do_GET(self) -> None:
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            self.send_error(404, explain="There are: " + ", ".join(self.server.pages))
            return
        kind, make = page
        data = make()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


def parse_bind(text: str) -> tuple[str, int]:
    """``ADDRESS:PORT``, an IPv6 address in brackets. Raises ValueError."""
    address, colon, port = text.rpartition(":")
    if not colon or not address or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    return address.removeprefix("[").removesuffix("]"), int(port)


def join_bind(address: str, port: int) -> str:
    """The inverse of :func:`parse_bind`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
