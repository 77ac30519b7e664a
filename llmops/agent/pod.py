"""A pod that is not node 0's: it joins that one, runs its node agent when told to, and leaves with the right code."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from llmops.agent import carry
from llmops.agent.lobby import HERE_S, folder
from llmops.agent.log import log
from llmops.agent.policy.k8s import Codes
from llmops.agent.rundir import RunDir
from llmops.agent.signals import SignalPipe
from llmops.agent.wire import Connection, Message, ProtocolError

CONNECT_S = 5.0
LOOK_S, LOOK_MAX_S = 0.5, 5.0  # between looks for a newer record of node 0
SILENT_S = 3 * HERE_S  # of node 0, before a look whether another pod has its place
TELL_S = 30.0  # between lines that say what is waited for
STOP_MARGIN_S = 5.0  # of the time that a pod has, for the way out
END_S = 20.0  # for a node agent to end once its coordinator is gone


@dataclass(frozen=True)
class Place:
    """Which pod this is, from the environment that the manifest gives it."""

    node: int
    address: str
    pod: str
    host: str

    @classmethod
    def of(cls, environment: dict[str, str]) -> Place:
        """Raises ValueError that names what is missing or no number."""
        try:
            node = int(environment["LLMOPS_FIRST_NODE"]) + int(environment["LLMOPS_REPLICA"])
            return cls(node, environment["LLMOPS_POD_IP"], environment["LLMOPS_POD"], environment["LLMOPS_HOST"])
        except KeyError as error:
            raise ValueError(f"{error} is not in the environment: this program is started by a manifest") from error


def over(rundir: RunDir, submission: int) -> int | None:
    """The exit code of a pod whose job is over: a controller may start one again all the same."""
    record = rundir.get(f"job/{submission:04d}/over.json")
    return None if record is None else int(record["exit_code"])


def start_agent(node: int, python: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the node agent of this pod."""
    command, source = carry.starter(python)
    full = [*carry.DEAF_START, *command, "node", "--node", str(node)]
    return subprocess.Popen(full, env={**os.environ, **environment}, stdin=source)


def reap_orphans(known: int | None) -> None:
    """Bury processes that the ranks have left behind: the first process of a container inherits them."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == known:  # what is known is waited for by whoever has started it
            return
        os.waitpid(found.si_pid, os.WNOHANG)


class Follower:
    """The pod of node ``place.node``."""

    def __init__(
        self, rundir: RunDir, submission: int, spec: dict[str, Any], place: Place, signals: SignalPipe, exits: Codes
    ) -> None:
        self.rundir, self.submission, self.spec, self.place = rundir, submission, spec, place
        self.signals, self.exits = signals, exits
        self.agent: subprocess.Popen[bytes] | None = None
        self.leave_by: float | None = None  # on the monotonic clock, once this pod was told to go
        self.wait_s = float(spec["options"]["wait_s"])
        self.joined = ""  # the record of node 0's pod that this one has joined

    def run(self) -> int:
        """Stay until the job is over or this pod has to go; returns its exit code."""
        while True:
            connection = self._find()
            code = self._serve(connection) if connection is not None else self.exits.stopped
            self._end_agent(END_S if self.leave_by is None else max(self.leave_by - time.monotonic(), 0.0))
            if code is not None:
                return code
            log("node 0 is gone; looking for its next pod")

    def _find(self) -> Connection | None:
        """Join node 0's newest pod. None when this pod must leave, or waited in vain."""
        began, told, pause = time.monotonic(), 0.0, LOOK_S
        while self.leave_by is None:
            if (code := over(self.rundir, self.submission)) is not None:
                raise Over(code)
            newest = self._newest()
            record = self.rundir.get(f"{folder(self.submission)}/{newest}") if newest else None
            if record is not None and (connection := self._join(record)) is not None:
                self.joined = newest
                return connection
            now = time.monotonic()
            if now - began > self.wait_s:
                log(f"the pod of node 0 did not come within {self.wait_s:.0f} s; leaving")
                return None
            if now - told > TELL_S:
                told = now
                state = f"at {record['address']} does not answer" if record else "has not come yet"
                log(f"node {self.place.node} waits for node 0, whose pod {state}")
            self._sleep(pause)
            pause = min(1.5 * pause, LOOK_MAX_S)
        return None

    def _newest(self) -> str:
        """The newest record of a pod of node 0; empty when there is none."""
        return max((name for name in self.rundir.list(folder(self.submission)) if name.endswith(".json")), default="")

    def _join(self, record: dict[str, Any]) -> Connection | None:
        host, port = str(record["address"]).rsplit(":", 1)
        try:
            connection = Connection(socket.create_connection((host, int(port)), timeout=CONNECT_S))
        except OSError:  # its pod is gone, or about to come; said above, while it lasts
            return None
        place = self.place
        message = {"type": "join", "token": record["token"], "node": place.node, "host": place.host}
        connection.send(message)
        return connection

    def _sleep(self, seconds: float) -> None:
        """Wait, but not for longer than until a signal."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.signals, selectors.EVENT_READ)
            if selector.select(seconds):
                self._on_signals(None)

    def _on_signals(self, connection: Connection | None) -> None:
        for number in self.signals.read():
            if number == signal.SIGCHLD:
                reap_orphans(self.agent.pid if self.agent else None)
            elif self.leave_by is None:
                grace = float(self.spec["options"]["grace_s"])
                log(f"this pod was told to go ({number.name}); {grace:.0f} s are left")
                self.leave_by = time.monotonic() + grace - STOP_MARGIN_S
                if connection is not None:
                    connection.send({"type": "leaving"})

    def _serve(self, connection: Connection) -> int | None:
        """Until node 0 lets this pod go, or is lost: then None."""
        look = time.monotonic() + SILENT_S
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self.signals, selectors.EVENT_READ)
            while True:
                if time.monotonic() > look:
                    # The host of a pod that was given up may be cut off or stopped: the connection does not tell.
                    if self._newest() != self.joined:
                        connection.close()
                        return None if self.leave_by is None else self.exits.stopped
                    look = time.monotonic() + SILENT_S
                if self.leave_by is not None and (self.agent is None or time.monotonic() > self.leave_by):
                    connection.close()
                    return self.exits.stopped
                for key, _ in selector.select(1.0):
                    if key.fileobj is self.signals:
                        self._on_signals(connection)
                        continue
                    try:
                        messages = connection.receive()
                    except ProtocolError as error:
                        log(f"node 0 spoke out of turn: {error}")
                        messages = None
                    look = time.monotonic() + SILENT_S
                    if messages is None:
                        return None if self.leave_by is None else self.exits.stopped
                    for message in messages:
                        code = self._on_message(message)
                        if code is not None:
                            self._end_agent(END_S)
                            connection.close()
                            return code
                if self.agent is not None and self.agent.poll() is not None:
                    self.agent = None
                    connection.send({"type": "ended"})

    def _on_message(self, message: Message) -> int | None:
        kind = message["type"]
        if kind == "launch" and self.leave_by is None:
            self.agent = start_agent(self.place.node, self.spec["python"], message["environment"])
        elif kind == "signal" and self.agent is not None:
            self.agent.send_signal(message["signal"])
        elif kind == "leave":
            return int(message["exit_code"])
        elif kind == "replaced":
            log("another pod has taken the place of this one")
            return self.exits.stopped
        return None

    def _end_agent(self, seconds: float) -> None:
        """The node agent ends by itself when its coordinator is gone. What does not is killed."""
        if self.agent is None:
            return
        try:
            self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            log(f"the node agent did not end within {seconds:.0f} s; it is killed")
            self.agent.kill()
            self.agent.wait()
        self.agent = None


class Over(Exception):
    """The job is over; the pod leaves with ``code``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the job is over; exit code {code}")
        self.code = code
