"""This machine: the supervisor is a process of its own, detached from the terminal that started it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops import agent_zip
from llmops.agent import carry
from llmops.agent.local import start_ticks
from llmops.agent.rundir import is_url
from llmops.backends.base import ArrayLimits, Look, Rejected, Submission
from llmops.errors import UserError
from llmops.job import JobSpec, JobView

TAG = "LLMOPS_TAG"


class LocalBackend:
    """Processes on this machine. A job id is ``host:pid:start``, which no later process can have."""

    name = "local"
    text_name = "command.txt"
    own_image = False

    def check(self, cluster: Any, run_url: str) -> None:
        """One node there is, and a Python to start the ranks with."""
        if cluster.nodes != 1:
            raise UserError(
                f"cluster.nodes={cluster.nodes}: the local backend has one node; set cluster.ranks_per_node instead"
            )

    def options(self, cluster: Any, spec_values: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def render(self, cluster: Any, spec: JobSpec, agent: Path | None) -> str:
        """The command line of the supervisor."""
        return shlex.join(self._command(spec, agent)) + "\n"

    def _command(self, spec: JobSpec, agent: Path | None) -> list[str]:
        program = [str(agent)] if agent else ["-c", carry.BOOTSTRAP]
        what = ["pool", "--study"] if spec.array else ["local", "--run"]
        return [spec.python, *program, *what, spec.run_url, "--submission", str(spec.submission)]

    def submit(self, submission: Submission) -> str:
        """Start the supervisor in a session of its own."""
        spec = submission.spec
        env = {name: value for name, value in os.environ.items() if name not in submission.hidden_env}
        log_file = _log_file(spec)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log, tempfile.TemporaryFile() as source:
            if submission.agent is None:
                source.write(carry.embed(agent_zip.build()[1]).encode())
                source.seek(0)
            try:
                process = subprocess.Popen(
                    self._command(spec, submission.agent),
                    stdin=source,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd="/" if is_url(spec.run_url) else spec.run_url,
                    env={**env, TAG: spec.tag},
                    start_new_session=True,
                )
            except OSError as error:
                raise Rejected(f"cluster.python={spec.python} cannot be started: {error.strerror}") from error
        # Nobody waits for it here: the supervisor outlives the launcher.
        process.returncode = 0
        return f"{socket.gethostname()}:{process.pid}:{start_ticks(process.pid)}"

    def find(self, tag: str) -> str | None:
        """The supervisor whose environment carries the tag; its agents and ranks inherit it, hence only the oldest."""
        needle = f"{TAG}={tag}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((start_ticks(int(entry.name)), int(entry.name)))
        return next((f"{socket.gethostname()}:{pid}:{ticks}" for ticks, pid in sorted(found)), None)

    def look(self, job_ids: Sequence[str], tags: Sequence[str] = ()) -> Look:
        """Running, or gone."""
        found = {tag: job_id for tag in tags if (job_id := self.find(tag))}
        return Look({job_id: self._describe(job_id) for job_id in [*job_ids, *found.values()]}, found)

    def _describe(self, job_id: str) -> JobView:
        host, pid = _parse(job_id)
        if host != socket.gethostname():
            return JobView(job_id, "unreachable", f"it runs on {host}; ask there")
        return JobView(job_id, "running") if pid else JobView(job_id, "gone", "its supervisor is no longer there")

    def array_limits(self, cluster: Any, parallel: int | None) -> ArrayLimits:
        """None: the pool starts trials as there is room for them."""
        return ArrayLimits()

    def element(self, job_id: str, index: int) -> str:
        """The pool's own: its trials' supervisors are processes of their own, which only their runs know."""
        return job_id

    def cancel(self, job_ids: Sequence[str], graceful: bool) -> None:
        """Wake the supervisors: they read the intent and stop, gracefully or at once."""
        for job_id in job_ids:
            host, pid = _parse(job_id)
            if host != socket.gethostname():
                raise UserError(f"{job_id} runs on {host}: cancel it there")
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def _log_file(spec: JobSpec) -> Path:
    """Where the supervisor's own lines go."""
    if not is_url(spec.run_url):
        return Path(spec.run_url, "job", f"{spec.submission:04d}", "supervisor.log")
    import platformdirs

    state = Path(platformdirs.user_state_dir("llmops", appauthor=False))
    return state / "supervisors" / f"{spec.run_id}.{spec.submission}.log"


def _parse(job_id: str) -> tuple[str, int | None]:
    """Host and pid of a job id; the pid is None when that process is gone. A foreign id is no process of this host."""
    host, pid, ticks = job_id.rsplit(":", 2) if job_id.count(":") >= 2 else (socket.gethostname(), "", "")
    if not pid.isdigit():
        return host, None
    if host != socket.gethostname():
        return host, None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return host, None
    alive = stat[19] == ticks and stat[0] != "Z"
    return host, int(pid) if alive else None
