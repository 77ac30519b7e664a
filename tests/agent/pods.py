"""Pods as processes, and what the real controllers were seen to do when one of them ends.

No container runs here, so the pods are processes with the environment and the signals that a kubelet gives them. What
becomes of the others follows the experiments with real controllers: an Indexed Job replaces the one pod, a JobSet stops
and restarts all, a PyTorchJob replaces the one pod for codes from 128 on and fails for lower ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmops import agent_zip
from llmops.agent.processes import MARKER
from llmops.agent.rundir import RunDir

WAIT_S = 60.0
PROGRAM = Path(__file__).parent / "pod_program.py"


@dataclass
class Pods:
    """A workload of ``nodes`` pods in the run directory ``root``."""

    root: Path
    workload: str
    nodes: int = 2
    grace_s: float = 20.0
    retry: dict[str, Any] = field(default_factory=lambda: retry())
    command: list[str] = field(default_factory=lambda: [sys.executable, str(PROGRAM)])
    kind: str = "command"
    state: str = "running"  # then: succeeded, failed

    def __post_init__(self) -> None:
        self.rundir = RunDir(str(self.root))
        self.agent = self.root / "agent.pyz"
        self.agent.write_bytes(agent_zip.build()[1])
        self.pods: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: list[tuple[int, int]] = []  # (node, exit code) in order
        self.restarting = False
        options = {"workload": self.workload, "grace_s": self.grace_s, "wait_s": WAIT_S, "job_id": "c/ns/job/x"}
        self.rundir.create(
            "job/0000/spec.json",
            {
                "run_id": "x", "name": "x", "submission": 0, "tag": "x.0.0", "backend": "k8s", "format": 1,
                "run_url": str(self.root), "nodes": self.nodes, "ranks_per_node": 1, "command": self.command,
                "kind": self.kind, "python": sys.executable, "env": {}, "secrets": [], "threads_per_rank": 1,
                "code_archive": None, "retry": self.retry, "options": {**options, "work_dir": str(self.root)},
                "stop": {"save_s": 5.0, "local_grace_s": 5.0, "signal": None, "hang_s": 0.0},
            },
        )  # fmt: skip

    def start(self, *nodes: int) -> Pods:
        """Start pods; all of them by default."""
        for node in nodes or range(self.nodes):
            environment = {
                "LLMOPS_FIRST_NODE": "1" if self.workload == "pytorchjob" and node else "0",
                "LLMOPS_REPLICA": str(node - 1 if self.workload == "pytorchjob" and node else node),
                "LLMOPS_POD_IP": "127.0.0.1",
                "LLMOPS_POD": f"x-{node}-{len(self.codes)}",
                "LLMOPS_HOST": f"host{node}",
            }
            command = [sys.executable, str(self.agent), "k8s", "--run", str(self.root), "--submission", "0"]
            self.spawn(node, command, {**environment, "PYTHONUNBUFFERED": "1"})
        return self

    def spawn(self, node: int, command: list[str], environment: dict[str, str]) -> None:
        """Start the container of a pod."""
        with (self.root / f"pod{node}.log").open("ab") as log:
            self.pods[node] = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def delete(self, node: int, number: int = signal.SIGTERM) -> None:
        """What ``kubectl delete pod`` does first; with SIGKILL: what a lost node, or too little memory, does."""
        if number == signal.SIGKILL:
            self.kill_all(node)
        else:
            self.pods[node].send_signal(number)

    def kill_all(self, node: int) -> None:
        """Every process of a pod at once, as the kernel ends a container."""
        pod = self.pods[node]
        family, found = {pod.pid}, True
        while found:
            found = False
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and int(entry.name) not in family and _parent(entry) in family:
                    family.add(int(entry.name))
                    found = True
        for pid in sorted(family):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def control(self) -> None:
        """One pass of the controller."""
        for node, pod in sorted(self.pods.items(), reverse=True):
            code = pod.poll()
            if code is None:
                continue
            del self.pods[node]
            self.codes.append((node, code if code >= 0 else 128 - code))
            self._ended(node, self.codes[-1][1])
        if self.restarting and not self.pods:
            self.restarting = False
            self.start()
        if self.state == "failed":
            self._stop_all()

    def _ended(self, node: int, code: int) -> None:
        if self.state != "running" or self.restarting:
            return
        if self.workload == "pytorchjob":
            if code == 0:
                self.state = "running" if node else "succeeded"
            elif code < 128:
                self.state = "failed"
            else:
                self.start(node)
        elif code == 0:
            if not self.pods:
                self.state = "succeeded"
        elif code == 77:
            self.state = "failed"
        elif self.workload == "job":
            self.start(node)
        else:  # JobSet, and the JobSet of a TrainJob
            self.restarting = True
            self._stop_all()

    def _stop_all(self) -> None:
        for pod in self.pods.values():
            pod.send_signal(signal.SIGTERM)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Let the controller work until ``condition`` holds."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            self.control()
            assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}; {self.codes}\n{self.logs()}"
            time.sleep(0.05)

    def until_over(self) -> None:
        """Until the workload has ended and no pod is left."""
        self.until(lambda: self.state != "running" and not self.pods, "the end of the workload")

    def until_running(self, attempt: int) -> None:
        """Until all ranks of an attempt run."""
        ranks = [self.root / f"started-{attempt}-{rank}" for rank in range(self.nodes)]
        self.until(lambda: all(path.exists() for path in ranks), f"the ranks of attempt {attempt}")

    def tell(self, what: str) -> None:
        """Tell the programs: ``finish``, or ``fail-ATTEMPT-RANK``."""
        (self.root / what).touch()

    def reasons(self) -> list[str]:
        """Why each attempt ended; a question mark where nobody could say."""
        ends = [self.rundir.get(f"attempts/{name}/end.json") for name in self.rundir.list("attempts")]
        return ["?" if end is None else str(end["reason"]) for end in ends]

    def logs(self) -> str:
        """What the pods have printed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.root.glob("pod*.log")))

    def close(self) -> None:
        """Leave nothing behind."""
        for node in list(self.pods):
            self.kill_all(node)
            self.pods[node].wait()

    def ranks_alive(self) -> list[int]:
        """Processes of this run's ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            except OSError:
                continue
            if f"{MARKER}=".encode() in environment and f"LLMOPS_RUN_URL={self.root}\0".encode() in environment:
                found.append(int(entry.name))
        return found


def retry(**changes: Any) -> dict[str, Any]:
    """A retry policy for tests."""
    return {"max_no_progress": 3, "max_failures": 20, "backoff_s": 0.05, "backoff_max_s": 0.1, **changes}


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1
