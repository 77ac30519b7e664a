"""The helper process that serves this node's metrics: ``python -m llmops.monitor.node_exporter``.

It needs llmops and prometheus-client, which the supervisor does not have. What becomes of it is never the run's matter:
where it cannot start or dies, one line says so, and it is started once more at most.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from llmops.agent.signals import be_apart

LEAVE_S = 1.0  # for the helper to end by itself
STARTS = 2
CANNOT = 2  # its exit code when another start would change nothing
TRAIN = "LLMOPS_METRICS_BIND"
PUSHGATEWAY = "LLMOPS_METRICS_PUSHGATEWAY"


class Plan:
    """Where a node serves what. ``port``: 0 for a free one."""

    def __init__(self, spec: dict[str, Any], own_address: str) -> None:
        metrics = spec.get("metrics") or {}
        self.enabled = bool(metrics.get("enabled"))
        self.pushgateway: str | None = metrics.get("pushgateway")
        host = metrics.get("host")
        own = reachable(own_address) if spec["backend"] == "slurm" else own_address
        self.bind: str = host or own
        self.address = own if self.bind in ("0.0.0.0", "::") else self.bind  # noqa: S104  (compared, not opened)
        # On Kubernetes the manifest names the ports, so that they are the same in every pod.
        self.port = int(metrics.get("port") or spec["options"].get("metrics_port") or 0)

    def rank_environment(self, rank: int) -> dict[str, str]:
        """What rank 0 is told. The built-in trainer heeds it, and any other program may."""
        if not self.enabled or rank != 0:
            return {}
        address = f"[{self.bind}]" if ":" in self.bind else self.bind
        found = {TRAIN: f"{address}:{self.port + 1 if self.port else 0}"}
        return {**found, PUSHGATEWAY: self.pushgateway} if self.pushgateway else found


def reachable(address: str) -> str:
    """``address``, or where that is the loopback of a job of one node: this node's own, as srun was started from it."""
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address.startswith("127.") or not launcher:
        return address
    try:
        with socket.socket() as probe:
            probe.bind((launcher, 0))
    except OSError:  # it is another machine's
        return address
    return launcher


class NodeExporter:
    """The helper of one node for one attempt."""

    def __init__(self, python: str, about: dict[str, Any]) -> None:
        """``about``: what the helper needs to know, as its module says."""
        self.command = [python, "-m", "llmops.monitor.node_exporter"]
        self.about, self.starts = about, 0
        self.process: subprocess.Popen[bytes] | None = None
        self._start()

    def tend(self) -> None:
        """To be called now and then: starts it again, once, should it have died."""
        if self.process is None or (code := self.process.poll()) is None:
            return
        self._close_pipe()
        self.process = None
        again = self.starts < STARTS and code != CANNOT
        _say(f"the metrics of this node are {'interrupted' if again else 'not served'}: their process returned {code}")
        if again:
            self._start()

    def close(self) -> None:
        """End it."""
        if self.process is None:
            return
        self._close_pipe()
        try:
            self.process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _start(self) -> None:
        self.starts += 1
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd="/",  # a folder named llmops in the current one must not be taken for the package
                bufsize=0,
                # One thread, and nothing imported after the fork: safe.
                preexec_fn=_apart,
            )
            assert self.process.stdin is not None
            # A pipe takes this much at once: nothing waits, even if the helper never reads it.
            self.process.stdin.write(json.dumps(self.about).encode() + b"\n")
        except (OSError, subprocess.SubprocessError) as error:
            _say(f"the metrics of this node are not served: {error}")

    def _close_pipe(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()


def _say(text: str) -> None:
    print(f"llmops: {text}", file=sys.stderr, flush=True)


def _apart() -> None:
    be_apart()
    os.nice(10)  # the ranks' time is worth more
