"""The supervisor on this machine: every node agent is a child process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from llmops.agent import carry
from llmops.agent.coordinator import StopRequest
from llmops.agent.policy.common import Decision, Outcome
from llmops.agent.policy.local import decide
from llmops.agent.rundir import RunDir
from llmops.agent.signals import STOP_SIGNALS, SignalPipe
from llmops.agent.supervise import Supervisor


def launch(nodes: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the agent of the one node there is."""
    assert nodes == 1, "the local backend has one node"
    command, source = carry.starter(sys.executable)
    return subprocess.Popen(
        [*command, "node", "--node", "0"],
        env={**os.environ, **environment},
        stdin=source,
    )


def main(rundir: RunDir, submission: int) -> int:
    """Entry point of ``agent.pyz local``."""
    # Before anything that takes time: a signal that comes now is kept for the first attempt.
    signals = SignalPipe(STOP_SIGNALS)
    host = socket.gethostname()
    job_id = f"{host}:{os.getpid()}:{start_ticks(os.getpid())}"
    supervisor = Supervisor(rundir, submission, job_id, 0, [host], "127.0.0.1")
    grace = float(supervisor.spec["stop"]["local_grace_s"])

    def on_signal(name: str) -> StopRequest | None:
        deadline = time.time() + grace
        return supervisor.cancel_request(deadline) or StopRequest(name, deadline)

    def next_step(outcome: Outcome) -> Decision:
        return decide(outcome, supervisor.cancelled(), supervisor.history(), supervisor.spec["retry"])

    return supervisor.run(
        signals,
        lambda env: launch(supervisor.spec["nodes"], env),
        on_signal,
        supervisor.poll,
        next_step,
        lambda decision: decision.exit_code,
    )


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its pid, a name that no later process can have."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        # The command's name, in parentheses, may hold blanks and parentheses itself.
        return int(file.read().rsplit(")", 1)[1].split()[19])
