"""Where the pods of a job find each other, and wait for the next attempt.

Node 0 listens, and says where in the run directory: no name has to resolve, and a newer pod of node 0 has a newer
record with a token of its own, so that pods of different lives never mix.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from llmops.agent.coordinator import log
from llmops.agent.rundir import RunDir
from llmops.agent.wire import Connection, Message, ProtocolError

GOODBYE_S = 30.0  # for the other pods to leave before node 0 does


def folder(submission: int) -> str:
    """Where the records of the lobbies of a submission are."""
    return f"job/{submission:04d}/meet"


@dataclass
class Guest:
    """Another pod that is there. ``running``: it was told to start its node agent, which has not ended."""

    node: int
    host: str
    pod: str
    connection: Connection
    running: bool = False
    leaving: bool = False


class Lobby:
    """Node 0's side: who is there. :meth:`serve` never waits longer than it is told."""

    def __init__(self, rundir: RunDir, submission: int, address: str, nodes: int) -> None:
        self.nodes = nodes
        self.guests: dict[int, Guest] = {}
        self.token = secrets.token_hex(16)
        self.server = socket.create_server((address, 0), backlog=1024)
        self.server.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.server, selectors.EVENT_READ)
        record = {"address": f"{address}:{self.server.getsockname()[1]}", "token": self.token, "time": time.time()}
        self.number = _put(rundir, folder(submission), record)

    def missing(self) -> list[int]:
        """Nodes that are not there, or about to leave."""
        there = {node for node, guest in self.guests.items() if not guest.leaving}
        return sorted(set(range(1, self.nodes)) - there)

    def leaving(self) -> list[Guest]:
        """Pods that were told to go and are still there."""
        return [guest for guest in self.guests.values() if guest.leaving]

    def tell(self, message: Message) -> None:
        """Send ``message`` to all pods."""
        for guest in list(self.guests.values()):
            guest.connection.send(message)

    def serve(self, seconds: float) -> None:
        """Take what comes within ``seconds``, which may be 0."""
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.server:
                self._accept()
            else:
                self._receive(key.data)

    def close(self, farewell: Message) -> None:
        """Let all pods go, and wait until they have gone."""
        self.tell(farewell)
        until = time.monotonic() + GOODBYE_S
        while self.guests and time.monotonic() < until:
            self.serve(until - time.monotonic())
        if self.guests:
            log(f"the pods of nodes {sorted(self.guests)} did not leave within {GOODBYE_S:.0f} s")
        self.server.close()
        self.selector.close()

    def _accept(self) -> None:
        try:
            sock, _ = self.server.accept()
        except BlockingIOError:
            return
        connection = Connection(sock)
        self.selector.register(connection, selectors.EVENT_READ, connection)

    def _receive(self, source: Any) -> None:
        connection: Connection = source.connection if isinstance(source, Guest) else source
        descriptor = connection.fileno()
        try:
            messages = connection.receive()
            for message in messages or []:
                if isinstance(source, Guest):
                    self._on_message(source, message)
                else:
                    source = self._join(connection, message)
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            log(f"a connection spoke out of turn and was closed: {error}")
            messages = None
            connection.close()
        if messages is None:
            self.selector.unregister(descriptor)
            if isinstance(source, Guest) and self.guests.get(source.node) is source:
                del self.guests[source.node]
                log(f"the pod of node {source.node} on {source.host} is gone")

    def _join(self, connection: Connection, message: Message) -> Guest:
        if not hmac.compare_digest(str(message.get("token", "")), self.token):
            raise ProtocolError("wrong token")
        node = int(message["node"])
        if not 1 <= node < self.nodes:
            raise ProtocolError(f"node {node} is not expected")
        guest = Guest(node, str(message["host"]), str(message["pod"]), connection)
        before = self.guests.get(node)
        if before is not None:
            # A controller makes a new pod only when it has given the old one up: that one may not know yet.
            before.connection.send({"type": "replaced"})
        self.guests[node] = guest
        self.selector.modify(connection, selectors.EVENT_READ, guest)
        return guest

    def _on_message(self, guest: Guest, message: Message) -> None:
        if message["type"] == "leaving":
            guest.leaving = True
            log(f"the pod of node {guest.node} on {guest.host} was told to go")
        elif message["type"] == "ended":
            guest.running = False


def _put(rundir: RunDir, where: str, record: dict[str, Any]) -> int:
    """Write the next record; returns its number."""
    for _ in range(1000):
        number = max((int(name[:-5]) for name in rundir.list(where) if name[:-5].isdigit()), default=-1) + 1
        if rundir.create(f"{where}/{number:04d}.json", record):
            return number
    raise RuntimeError(f"could not write to {rundir.path(where)}: a thousand others were faster")


class Fleet:
    """The node agents of an attempt, one in each pod, as the one process that the coordinator knows."""

    def __init__(self, lobby: Lobby, own: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
        self.lobby, self.own, self.pid = lobby, own, own.pid
        self.returncode: int | None = None
        self.started = list(lobby.guests.values())
        for guest in self.started:
            guest.running = True
            guest.connection.send({"type": "launch", "environment": environment})

    def poll(self) -> int | None:
        """0 once all node agents have ended, or their pods have gone."""
        self.lobby.serve(0)
        there = [guest for guest in self.started if self.lobby.guests.get(guest.node) is guest and guest.running]
        if self.returncode is None and self.own.poll() is not None and not there:
            self.returncode = self.own.returncode
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal the node agents that still run."""
        if self.own.poll() is None:
            self.own.send_signal(number)
        for guest in self.started:
            if guest.running:
                guest.connection.send({"type": "signal", "signal": int(number)})
