"""Messages between the coordinator and the node agents: one JSON object a line over TCP."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

MAX_LINE = 1 << 20

Message = dict[str, Any]


class ProtocolError(Exception):
    """The other side sent what no supervisor sends."""


class Connection:
    """A socket that carries messages. Reads never block; writes wait at most ``SEND_TIMEOUT`` seconds."""

    SEND_TIMEOUT = 10.0

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""
        self.closed = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose machine vanished sends no FIN: notice within about 15 seconds.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        # Without this, unacknowledged data would keep a dead peer's connection open for many minutes.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15000)

    def fileno(self) -> int:
        """For selectors."""
        return self.sock.fileno()

    def send(self, message: Message) -> None:
        """Send one message; a connection that cannot take it is shut down, which the reader sees as a lost peer."""
        try:
            self.sock.settimeout(self.SEND_TIMEOUT)
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            # Not closed: a selector forgets a closed socket without a word, and nobody would learn of the loss.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Message] | None:
        """The messages that have arrived, or None when the other side is gone."""
        if self.closed:
            return None
        try:
            self.sock.setblocking(False)
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.close()
            return None
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        if len(self._buffer) > MAX_LINE:
            raise ProtocolError(f"a message longer than {MAX_LINE} bytes")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError as error:
                raise ProtocolError(f"not JSON: {line[:80]!r}") from error
            if not isinstance(message, dict):
                raise ProtocolError(f"not an object: {line[:80]!r}")
            messages.append(message)
        return messages

    def close(self) -> None:
        """Close the socket; harmless when it is closed already."""
        self.closed = True
        self.sock.close()
