"""Where the pods of a job find each other, and wait for the next attempt.

Node 0 listens, and says where in the run directory: no name has to resolve, and a newer pod of node 0 has a newer
record with a token of its own, so that pods of different lives never mix.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from llmops.agent.log import log
from llmops.agent.meeting import Meeting, Member
from llmops.agent.rundir import RunDir
from llmops.agent.wire import Connection, Message, ProtocolError

HERE_S = 5.0  # between messages that only say that node 0 is there
GOODBYE_S = 30.0  # for the other pods to leave before node 0 does


def folder(submission: int) -> str:
    """Where the records of the lobbies of a submission are."""
    return f"job/{submission:04d}/meet"


@dataclass
class Guest(Member):
    """Another pod that is there. ``running``: it was told to start its node agent, which has not ended."""

    running: bool = False
    leaving: bool = False


class Lobby(Meeting[Guest]):
    """Node 0's side: who is there. :meth:`serve` never waits longer than it is told."""

    def __init__(self, rundir: RunDir, submission: int, address: str, nodes: int) -> None:
        super().__init__(socket.create_server((address, 0), backlog=1024), secrets.token_hex(16))
        self.nodes = nodes
        self.tell_next = 0.0  # when to say again that this one is there, on the monotonic clock
        self.server.setblocking(False)
        self.selector.register(self.server, selectors.EVENT_READ)
        record = {"address": f"{address}:{self.server.getsockname()[1]}", "token": self.token, "time": time.time()}
        self.number = _put(rundir, folder(submission), record)

    def missing(self) -> list[int]:
        """Nodes that are not there, or about to leave."""
        there = {node for node, guest in self.members.items() if not guest.leaving}
        return sorted(set(range(1, self.nodes)) - there)

    def leaving(self) -> list[Guest]:
        """Pods that were told to go and are still there."""
        return [guest for guest in self.members.values() if guest.leaving]

    def tell(self, message: Message) -> None:
        """Send ``message`` to all pods."""
        for guest in list(self.members.values()):
            guest.connection.send(message)

    def serve(self, seconds: float) -> None:
        """Take what comes within ``seconds``, which may be 0. Tells the others now and then that this one is there."""
        if time.monotonic() > self.tell_next:
            self.tell_next = time.monotonic() + HERE_S
            self.tell({"type": "here"})
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.server:
                self.accept()
            else:
                self.receive(key.data)

    def close(self, farewell: Message) -> None:
        """Let all pods go, and wait until they have gone."""
        self.tell(farewell)
        until = time.monotonic() + GOODBYE_S
        while self.members and time.monotonic() < until:
            self.serve(until - time.monotonic())
        if self.members:
            log(f"the pods of nodes {sorted(self.members)} did not leave within {GOODBYE_S:.0f} s")
        self.server.close()
        self.selector.close()

    def join(self, node: int, connection: Connection, message: Message) -> Guest:
        if not 1 <= node < self.nodes:
            raise ProtocolError(f"node {node} is not expected")
        before = self.members.get(node)
        if before is not None:
            # A controller makes a new pod only when it has given the old one up: that one may not know yet.
            before.connection.send({"type": "replaced"})
        return Guest(node, str(message["host"]), connection)

    def heard(self, guest: Guest, message: Message) -> None:
        if message["type"] == "leaving":
            guest.leaving = True
            log(f"the pod of node {guest.node} on {guest.host} was told to go")
        elif message["type"] == "ended":
            guest.running = False

    def gone(self, guest: Guest) -> None:
        if self.members.get(guest.node) is guest:  # else another pod has its place
            del self.members[guest.node]
            log(f"the pod of node {guest.node} on {guest.host} is gone")


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
        self.started = list(lobby.members.values())
        for guest in self.started:
            guest.running = True
            guest.connection.send({"type": "launch", "environment": environment})

    def poll(self) -> int | None:
        """0 once all node agents have ended, or their pods have gone."""
        self.lobby.serve(0)
        there = [guest for guest in self.started if self.lobby.members.get(guest.node) is guest and guest.running]
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
