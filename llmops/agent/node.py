"""The node agent: starts this node's ranks, keeps their output, tells the coordinator what happens to them."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

from llmops.agent import processes, ranks, snapshot, torchrun
from llmops.agent.commits import LAST_PATIENCE_S, PATIENCE_S, Commits
from llmops.agent.control import ControlDir
from llmops.agent.exporter import NodeExporter, Plan
from llmops.agent.output import RankOutput
from llmops.agent.rundir import RunDir, open_rundir
from llmops.agent.signals import STOP_SIGNALS, SignalPipe
from llmops.agent.wire import Connection, Message

TICK_S = 1.0
RESCUE_TICK_S = 0.1  # nothing announces the end of a process that is not our child
RESCUE_MARGIN_S = 10.0  # beside the time that a rescue may take: its processes agree first
OUTPUT_GRACE_S = 2.0


@dataclass
class Rank:
    """One running rank."""

    place: ranks.Placement
    process: subprocess.Popen[bytes]
    output: RankOutput
    code: int | None = None


class NodeAgent:
    """Runs the ranks of one node for one attempt."""

    def __init__(self, node: int, address: str, token: str) -> None:
        self.node = node
        self.agent_id = uuid.uuid4().hex
        self.guard = processes.start_guard(self.agent_id)
        self.signals = SignalPipe((*STOP_SIGNALS, signal.SIGCHLD))
        host, port = address.rsplit(":", 1)
        self.coordinator = Connection(socket.create_connection((host, int(port)), timeout=30))
        # Reserved until the ranks start, so that two agents on one machine never announce the same port.
        self.reserved = socket.create_server((own_address(host), 0))
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.signals, selectors.EVENT_READ, "signals")
        self.selector.register(self.coordinator, selectors.EVENT_READ, "coordinator")
        self.ranks: list[Rank] = []
        self.rundir: RunDir | None = None
        self.exporter: NodeExporter | None = None
        self.control: ControlDir | None = None
        self.commits: Commits | None = None  # of a program that is not ours
        self.spec: dict[str, Any] = {}
        self.deadline: float | None = None  # epoch seconds by which a stop must be over
        self.rescuers: set[int] = set()  # processes that are spared for a while
        self.rescue_until = 0.0
        self.workers: set[int] = set()  # of a torchrun, that were told to stop
        self.failure_told = False
        self.end_told = False
        self.coordinator.send(
            {
                "type": "hello",
                "token": token,
                "node": node,
                "host": node_name(),
                "pid": os.getpid(),
                "address": self.reserved.getsockname()[0],
                "port": self.reserved.getsockname()[1],
            }
        )

    def run(self) -> int:
        """Serve the coordinator until it says goodbye or is gone. Returns this process's exit code."""
        try:
            while True:
                for key, _ in self.selector.select(RESCUE_TICK_S if self.rescuers else TICK_S):
                    if key.data == "signals":
                        self._on_signals()
                    elif key.data == "coordinator":
                        messages = self.coordinator.receive()
                        if messages is None:
                            return self._orphaned()
                        for message in messages:
                            if message["type"] == "bye":
                                return 0
                            self._on_message(message)
                    else:
                        self._pump(key.data)
                self._reap()
                self._check_time()
                if self.rundir:
                    self.rundir.tend()
                if self.commits and not self.end_told:
                    self.commits.tend()
                if self.exporter:
                    self.exporter.tend()
        finally:
            self._kill()
            if self.exporter:
                self.exporter.close()
            if self.control:
                self.control.remove()
            if self.rundir:
                self.rundir.close()

    def _orphaned(self) -> int:
        if self.ranks:
            print(f"llmops: node {self.node}: the coordinator is gone; stopping", file=sys.stderr, flush=True)
        return 1

    def _on_signals(self) -> None:
        for number in self.signals.read():
            if number != signal.SIGCHLD:
                self.coordinator.send({"type": "signal", "signal": number.name, "node": self.node})

    def _on_message(self, message: Message) -> None:
        if message["type"] == "start":
            try:
                self._start(message)
            except (ranks.SpecError, OSError) as error:
                # The reason first: once all agents have ended, nobody listens any more.
                self._tell_failure(None, str(error), "failed")
                self._kill()
        elif message["type"] == "stop":
            self._stop(message["cause"], time.time() + message["seconds"])
        elif message["type"] == "abort":
            if message.get("rescue"):
                self._begin_rescue()
            if not self.rescuers or not message.get("rescue"):
                self._kill()

    def _start(self, message: Message) -> None:
        self.spec, attempt = message["spec"], message["attempt"]
        self.rundir = rundir = open_rundir(self.spec["run_url"], self.spec["python"])
        self.control = ControlDir(self.spec["run_id"], attempt["number"], self.node)
        secrets = ranks.read_secrets(self.spec["options"].get("secrets_file"), self.spec["secrets"])
        archive = self.spec["code_archive"]
        code = snapshot.unpack(archive, rundir) if archive else None
        offered = None
        if self.spec["kind"] == "command":
            self.commits = Commits(rundir, self.control, attempt["number"])
            offered = self.control.offer_preempt()
        per_node = self.spec["ranks_per_node"]
        metrics = Plan(self.spec, self.reserved.getsockname()[0])
        self.reserved.close()
        for local_rank in range(per_node):
            place = ranks.Placement(
                rank=self.node * per_node + local_rank,
                local_rank=local_rank,
                node=self.node,
                world_size=per_node * self.spec["nodes"],
                local_world_size=per_node,
                master_addr=message["master_addr"],
                master_port=message["master_port"],
            )
            env = ranks.environment(self.spec, place, attempt, self.control.path, code, self.agent_id, offered)
            env.update(metrics.rank_environment(place.rank))
            process = ranks.start_rank(self.spec, place, {**env, **secrets}, code)
            assert process.stdout is not None
            output = RankOutput(
                os.dup(process.stdout.fileno()),
                rundir,
                f"logs/{attempt['number']:04d}/{node_name()}/rank{place.rank}",
                [value.encode() for value in secrets.values() if value],
            )
            process.stdout.close()
            rank = Rank(place, process, output)
            self.ranks.append(rank)
            self.selector.register(output, selectors.EVENT_READ, rank)
        self.coordinator.send({"type": "started", "node": self.node, "time": time.time()})
        if metrics.enabled:
            self.exporter = NodeExporter(self.spec["python"], self._about_metrics(metrics, attempt["number"]))

    def _about_metrics(self, plan: Plan, attempt: int) -> dict[str, Any]:
        return {
            "run_url": self.spec["run_url"],
            "attempt": attempt,
            "node": self.node,
            "name": node_name(),
            "control": self.control.path if self.control else "",
            "bind": plan.bind,
            "address": plan.address,
            "port": plan.port,
            "ranks": {str(rank.place.rank): rank.process.pid for rank in self.ranks},
        }

    def _stop(self, cause: str, deadline: float) -> None:
        if self.control is None:
            return
        self.control.request_stop(cause, deadline)
        first = self.deadline is None
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)
        name = self.spec["stop"]["signal"]
        if first and name and self.spec["kind"] == "command":
            for rank in self.ranks:
                # A program that writes heartbeats takes part in the control directory: the flag is enough for it.
                if rank.code is None and not any(self.control.heartbeat(each) for each in self._speakers(rank)):
                    self._signal(rank, signal.Signals[name])

    def _signal(self, rank: Rank, number: signal.Signals) -> None:
        if not torchrun.is_torchrun(self.spec["command"]):
            rank.process.send_signal(number)
            return
        self.workers = torchrun.tell_workers(rank.process.pid, self.agent_id, number)
        if not self.workers:
            self._kill()  # as the signal would have done

    def _speakers(self, rank: Rank) -> list[int]:
        """The numbers under which a rank tells of itself. The workers of a torchrun have those that it gives them."""
        told = self.control.speakers() if self.control is not None and len(self.ranks) == 1 else []
        return told or [rank.place.rank]

    def _pump(self, rank: Rank) -> None:
        if rank.output.open and not rank.output.pump():
            self.selector.unregister(rank.output.pipe)

    def _close_output(self, rank: Rank) -> None:
        if rank.output.open:
            self.selector.unregister(rank.output.pipe)
            if rank.output.pump():
                rank.output.close()

    def _reap(self) -> None:
        for rank in self.ranks:
            if rank.code is not None:
                continue
            code = rank.process.poll()
            if code is None:
                continue
            rank.code = code
            # What is left in its pipe belongs to its last words; what its orphans still write is not waited for.
            self._pump(rank)
            stopping = self.deadline is not None
            # While the ranks stop, only the deadline hurries them: the others may still be saving.
            if code != 0 and not stopping:
                self._begin_rescue()
                self._tell_failure(rank, rank.output.tail(), "failed")
        if self.ranks and not self.rescuers and all(rank.code is not None for rank in self.ranks):
            self._tell_end()

    def _begin_rescue(self) -> None:
        """A rank has died. Kill the others, but let processes that commit their last state do so, for a limited time.

        Called again, when another node is the first to say so, it changes nothing.
        """
        if self.control is None or self.rescuers or self.end_told:
            return
        told = [each for rank in self.ranks if (each := self.control.rescuer(rank.place.rank)) is not None]
        alive = processes.marked(self.agent_id)  # a process id may have been used again
        self.rescuers = {pid for pid, _ in told if pid in alive}
        if self.rescuers:
            self.rescue_until = time.monotonic() + max(seconds for _, seconds in told) + RESCUE_MARGIN_S
            processes.kill_marked(self.agent_id, spare=self.rescuers)

    def _check_rescue(self) -> None:
        """The rescue is over when its processes have left, when they take too long, or when a stop request hurries."""
        hurried = self.deadline is not None and time.time() > self.deadline
        if hurried or time.monotonic() > self.rescue_until or not self.rescuers & set(processes.marked(self.agent_id)):
            self.rescuers = set()
            self._kill()

    def _check_time(self) -> None:
        if self.rescuers:
            self._check_rescue()
            return
        running = [rank for rank in self.ranks if rank.code is None]
        if not running or self.control is None:
            return
        if self.deadline is not None:
            # Torchrun may start its workers again, who know nothing of the stop.
            over = self.workers and not self.workers & set(processes.marked(self.agent_id))
            if over or time.time() > self.deadline:
                self._kill()
            return
        limit = float(self.spec["stop"]["hang_s"])
        if not limit or self.failure_told:
            return
        for rank in running:
            # Ranks wait for each other; one that a torchrun no longer has must not count.
            ages = [
                (age, each) for each in self._speakers(rank) if (age := self.control.heartbeat_age(each)) is not None
            ]
            age, speaker = min(ages, default=(0.0, 0))
            if age > limit:
                beat = self.control.heartbeat(speaker) or {}
                where = f"step {beat.get('step')}, {beat.get('phase')}"
                text = f"rank {rank.place.rank} gave no heartbeat for {age:.0f} s (stop.hang_s={limit:.0f}; {where})"
                self._tell_failure(rank, f"{rank.output.tail()}\n{text}", "hung")
                return

    def _steps(self) -> tuple[int | None, int | None]:
        """First and last step of this attempt, as the ranks' heartbeats tell; None for programs that write none."""
        first: int | None = None
        last: int | None = None
        for speaker in [each for rank in self.ranks for each in self._speakers(rank)]:
            beat = (self.control.heartbeat(speaker) if self.control else None) or {}
            if isinstance(beat.get("first_step"), int):
                first = beat["first_step"] if first is None else min(first, beat["first_step"])
            if isinstance(beat.get("step"), int) and first is not None:
                last = beat["step"] if last is None else max(last, beat["step"])
        return first, last

    def _tell_failure(self, rank: Rank | None, error: str, kind: str) -> None:
        """Tell the coordinator at once, so that the other nodes need not wait for a collective that will never end."""
        if self.failure_told:
            return
        self.failure_told = True
        failed = rank.place.rank if rank else None
        self.coordinator.send({"type": "failed", "node": self.node, "kind": kind, "error": error, "rank": failed})

    def _tell_end(self) -> None:
        """Tell the coordinator that no rank of this node is left, and how each ended."""
        if self.end_told:
            return
        self.end_told = True
        first, last = self._steps()
        stopped = self._stopped()
        if self.commits:
            left = LAST_PATIENCE_S if self.deadline is None else self.deadline - time.time()
            self.commits.tend(min(max(left, PATIENCE_S), LAST_PATIENCE_S) + 1)
        self.coordinator.send(
            {
                "type": "ended",
                "node": self.node,
                "exit_codes": {str(rank.place.rank): rank.code for rank in self.ranks},
                "first_step": first,
                "last_step": last,
                "saved": bool(stopped) and all(stopped),
                "stopped": any(stopped),
                "time": time.time(),
            }
        )

    def _stopped(self) -> list[bool]:
        """Of every rank that should have written one: whether its marker is there."""
        if self.control is None:
            return []
        return [self.control.stopped(each) is not None for rank in self.ranks for each in self._speakers(rank)]

    def _kill(self) -> None:
        """Kill the ranks and all that they started; what they wrote until then is kept."""
        survivors = processes.kill_marked(self.agent_id) if self.ranks else []
        if survivors:
            print(f"llmops: node {self.node}: processes {survivors} cannot be killed", file=sys.stderr, flush=True)
        for rank in self.ranks:
            if rank.code is None:
                try:
                    rank.code = rank.process.wait(timeout=OUTPUT_GRACE_S)
                except subprocess.TimeoutExpired:
                    rank.code = -signal.SIGKILL
            self._close_output(rank)
        self._tell_end()


def node_name() -> str:
    """This node's name as the scheduler calls it, or the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("LLMOPS_HOST") or socket.gethostname()


def own_address(peer: str) -> str:
    """The address of this machine on the route to ``peer``: what other nodes can reach it by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only picks the route.
        probe.connect((socket.gethostbyname(peer), 9))
        return str(probe.getsockname()[0])


def main(node: int) -> int:
    """Entry point of ``agent.pyz node``; the coordinator's address and token are in the environment."""
    address = os.environ.pop("LLMOPS_RENDEZVOUS", "")
    token = os.environ.pop("LLMOPS_RENDEZVOUS_TOKEN", "")
    if not address or not token:
        print("llmops: the node agent is started by its coordinator, not by hand", file=sys.stderr)
        return 2
    return NodeAgent(node, address, token).run()
