"""Servers on loopback that notifications are sent to."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Hook:
    """An HTTP server that answers with ``codes`` in turn, the last one for ever; ``None``: never."""

    def __init__(self, *codes: int | None, headers: dict[str, str] | None = None, tls: Path | None = None) -> None:
        self.posts: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.closed = threading.Event()
        hook, left = self, list(codes or (200,))

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.requests.append((self.path, self.headers["Content-Type"]))
                hook.posts.append(json.loads(body))
                code = left.pop(0) if len(left) > 1 else left[0]
                if code is None:
                    hook.closed.wait(60)
                    return
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                hook.requests.append((self.path, "GET"))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}/services/T0KEN-SECRET"

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()


class MailServer:
    """As much SMTP as one mail after the other needs. ``refuse``: answers 550 to these addresses."""

    def __init__(self, refuse: tuple[str, ...] = (), password: str | None = None) -> None:
        self.mails: list[tuple[str, list[str], str]] = []
        self.logins: list[str] = []
        self._refuse, self._password = refuse, password
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                self._serve(stream)

    def _serve(self, stream: Any) -> None:
        def say(text: str) -> None:
            stream.write(text.encode() + b"\r\n")
            stream.flush()

        sender, to = "", []
        say("220 here")
        while line := stream.readline().decode().strip():
            verb = line.split(" ")[0].upper()
            if verb == "EHLO":
                say("250-here\r\n250 AUTH PLAIN" if self._password else "250 here")
            elif verb == "AUTH":
                self.logins.append(line)
                say("235 yes" if self._password == "right" else "535 no, not with that password")
            elif verb == "MAIL":
                sender = line
                say("250 ok")
            elif verb == "RCPT":
                refused = any(address in line for address in self._refuse)
                to += [] if refused else [line]
                say("550 nobody" if refused else "250 ok")
            elif verb == "DATA":
                say("354 go on")
                lines = []
                while (text := stream.readline().decode()) != ".\r\n":
                    lines.append(text)
                self.mails.append((sender, to, "".join(lines)))
                say("250 ok")
            elif verb == "QUIT":
                say("221 bye")
                return
            else:
                say("250 ok")

    def close(self) -> None:
        self._socket.close()


def certificate(folder: Path) -> Path:
    """A certificate that nobody vouches for, with its key."""
    key, pem = folder / "key.pem", folder / "self-signed.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(pem)], check=True, capture_output=True, timeout=60)
    pem.write_text(key.read_text() + pem.read_text())
    return pem


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.05)
