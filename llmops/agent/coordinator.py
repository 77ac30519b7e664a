"""One attempt, from the rendezvous of its node agents to their farewell."""

from __future__ import annotations

import secrets
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmops.agent.log import log
from llmops.agent.meeting import Meeting, Member
from llmops.agent.policy.common import Outcome
from llmops.agent.signals import SignalPipe
from llmops.agent.wire import Connection, Message, ProtocolError

JOIN_TIMEOUT_S = 180.0
FAREWELL_S = 20.0
TICK_S = 1.0


class Agents(Protocol):
    """All node agents of an attempt as one process, which ends when they all have."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def send_signal(self, number: int) -> None:
        """Signal all that still run."""


# Starts the node agents of an attempt with the given environment added.
Launcher = Callable[[dict[str, str]], Agents]


@dataclass(frozen=True)
class StopRequest:
    """Why and until when the ranks are to stop. ``abort``: at once, without saving."""

    cause: str
    deadline: float
    abort: bool = False
    requested: float = field(default_factory=time.time)

    def record(self) -> dict[str, Any]:
        """As it stands in the attempt's record."""
        return {"cause": self.cause, "requested": self.requested, "deadline": self.deadline}


@dataclass
class Peer(Member):
    """A node agent that has joined."""

    ended: Message | None = None


class Rendezvous:
    """Where the node agents of a job meet: one listening socket for all its attempts."""

    def __init__(self, host: str) -> None:
        self.token = secrets.token_hex(16)
        self.server = socket.create_server((host, 0), backlog=1024)
        self.server.setblocking(False)
        self.address = f"{host}:{self.server.getsockname()[1]}"

    def environment(self) -> dict[str, str]:
        """What a node agent needs to find its way here."""
        return {"LLMOPS_RENDEZVOUS": self.address, "LLMOPS_RENDEZVOUS_TOKEN": self.token}


class Coordinator(Meeting[Peer]):
    """Runs one attempt.

    ``on_signal`` turns a signal's name into a stop request; ``poll`` may ask for one at any time.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        attempt: dict[str, Any],
        rendezvous: Rendezvous,
        signals: SignalPipe,
        on_signal: Callable[[str], StopRequest | None],
        poll: Callable[[], StopRequest | None],
    ) -> None:
        super().__init__(rendezvous.server, rendezvous.token)
        self.spec, self.attempt, self.rendezvous = spec, attempt, rendezvous
        self.signals, self.on_signal, self.poll = signals, on_signal, poll
        self.stop: StopRequest | None = None
        self.failure: Message | None = None
        self.lost: list[str] = []
        self.started = False
        self.selector.register(rendezvous.server, selectors.EVENT_READ, "join")
        self.selector.register(signals, selectors.EVENT_READ, "signals")
        self.late = selectors.DefaultSelector()
        self.late.register(rendezvous.server, selectors.EVENT_READ)

    def run(self, launch: Launcher) -> Outcome:
        """Start the node agents and stay until the last of them has ended."""
        process = launch(self.rendezvous.environment())
        try:
            outcome = self._serve(process)
        finally:
            for peer in self.members.values():
                peer.connection.send({"type": "bye"})
            self._leave(process)
            for key in list(self.selector.get_map().values()):
                self.selector.unregister(key.fileobj)
                if isinstance(key.data, (Connection, Peer)):
                    (key.data if isinstance(key.data, Connection) else key.data.connection).close()
            self.selector.close()
            self.late.close()
        return outcome

    def _serve(self, process: Agents) -> Outcome:
        join_by = time.monotonic() + JOIN_TIMEOUT_S
        nodes = self.spec["nodes"]
        while True:
            for key, _ in self.selector.select(TICK_S):
                if key.data == "join":
                    self.accept()
                elif key.data == "signals":
                    for number in self.signals.read():
                        if number not in (signal.SIGCHLD, signal.SIGCONT):
                            self._ask(self.on_signal(number.name))
                else:
                    self.receive(key.data)
            self._ask(self.poll())
            if not self.started and len(self.members) == nodes and not self.stop:
                self._start()
            if (
                self.members
                and all(peer.ended for peer in self.members.values())
                and (len(self.members) == nodes or self.stop)
            ):
                return self._outcome()
            if not self.started and self.stop:
                return self._outcome()
            gone = process.poll() is not None
            if (gone and not self._pending_data()) or (not self.started and time.monotonic() > join_by):
                missing = sorted(set(range(nodes)) - {node for node, peer in self.members.items()})
                if missing:
                    self.lost.append(
                        f"node agents {missing} of {nodes} never came: "
                        + (
                            f"their launcher returned {process.returncode}"
                            if gone
                            else f"waited {JOIN_TIMEOUT_S:.0f} s"
                        )
                    )
                elif gone:
                    self.lost.append(f"the launcher of the node agents returned {process.returncode} too early")
                return self._outcome()

    def _pending_data(self) -> bool:
        """Whether an agent's last words are still to be read."""
        return bool(self.selector.select(0))

    def join(self, node: int, connection: Connection, message: Message) -> Peer:
        if node in self.members or not 0 <= node < self.spec["nodes"]:
            raise ProtocolError(f"node {node} is not expected")
        if node == 0:
            self.master = (str(message["address"]), int(message["port"]))
        return Peer(node, str(message["host"]), connection)

    def _start(self) -> None:
        self.started = True
        address, port = self.master
        message = {
            "type": "start",
            "spec": self.spec,
            "attempt": self.attempt,
            "master_addr": address,
            "master_port": port,
        }
        for peer in self.members.values():
            peer.connection.send(message)

    def heard(self, peer: Peer, message: Message) -> None:
        kind = message["type"]
        if kind == "signal":
            self._ask(self.on_signal(message["signal"]))
        elif kind == "failed":
            if self.failure is None and not self.stop:
                self.failure = {**message, "host": peer.host}
                log(f"attempt {self.attempt['number']}: rank {message['rank']} on {peer.host} {message['kind']}")
                # With a node lost, what is in the memory of the others is no whole state.
                self._broadcast({"type": "abort", "rescue": not self.lost})
        elif kind == "ended":
            peer.ended = message

    def gone(self, peer: Peer) -> None:
        if peer.ended:
            return
        self.lost.append(f"the node agent on {peer.host} is gone")
        log(self.lost[-1])
        peer.ended = {"exit_codes": {}, "first_step": None, "last_step": None, "saved": False, "host": peer.host}
        self._broadcast({"type": "abort"})

    def _ask(self, request: StopRequest | None) -> None:
        if request is None:
            return
        if self.stop and (request.deadline >= self.stop.deadline or self.stop.abort):
            return
        if not self.stop:
            log(f"attempt {self.attempt['number']}: stop requested ({request.cause})")
        # A later request can only shorten the time; the first one names the cause.
        first = self.stop or request
        self.stop = StopRequest(first.cause, request.deadline, request.abort, first.requested)
        if request.abort:
            self._broadcast({"type": "abort"})
        else:
            # Seconds, not a time of day: the clocks of two nodes may differ.
            left = self.stop.deadline - time.time()
            self._broadcast({"type": "stop", "cause": self.stop.cause, "seconds": left})

    def _broadcast(self, message: Message) -> None:
        for peer in self.members.values():
            if not peer.connection.closed:
                peer.connection.send(message)

    def _outcome(self) -> Outcome:
        ends = [peer.ended for peer in self.members.values() if peer.ended]
        codes = {rank: code for end in ends for rank, code in end["exit_codes"].items()}
        firsts = [end["first_step"] for end in ends if end["first_step"] is not None]
        lasts = [end["last_step"] for end in ends if end["last_step"] is not None]
        ranks = self.spec["nodes"] * self.spec["ranks_per_node"]
        kind, error, rank, host = "failed", None, None, None
        # A torchrun hides its workers' exit codes: that they have stopped is in their markers.
        stopped = self.stop is not None and any(end.get("stopped") for end in ends)
        if len(codes) == ranks and not any(codes.values()) and not stopped:
            kind = "finished"
        elif self.failure:
            kind = "hung" if self.failure["kind"] == "hung" else "failed"
            error, rank, host = self.failure["error"], self.failure["rank"], self.failure["host"]
        elif self.lost and not self.stop:
            kind, error = "lost", "; ".join(self.lost)
            host = next((peer.host for peer in self.members.values() if (peer.ended or {}).get("host")), None)
        elif self.stop:
            kind = "stopped"
        return Outcome(
            kind=kind,
            exit_codes=codes,
            first_step=min(firsts, default=None),
            last_step=max(lasts, default=None),
            saved=bool(ends) and all(end["saved"] for end in ends),
            error=error,
            failed_rank=rank,
            failed_host=host,
            stop=self.stop.record() if self.stop else None,
        )

    def _leave(self, process: Agents) -> None:
        """Wait until the node agents are gone; they have nothing left to do but exit."""
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                log(f"the node agents do not leave; sending {number.name}")
                process.send_signal(number)
            deadline = time.monotonic() + (FAREWELL_S if number is None else 5)
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    return
                # An agent that was still on its way when the attempt was stopped is told so, not left waiting.
                if self.late.select(0.05):
                    sock, _ = self.rendezvous.server.accept()
                    Connection(sock).close()
        log(f"process {process.pid} outlives SIGKILL")
