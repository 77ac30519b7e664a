"""Plain functions that tests use to drive the development cluster (slurm/dev-cluster.sh)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

SCRIPT = Path(__file__).parents[2] / "slurm" / "dev-cluster.sh"
STATE_DIR = Path(os.environ.get("LLMOPS_SLURM_DIR", "/var/lib/llmops-slurm"))
NODES = ("n1", "n2", "n3", "n4")
CPUS_PER_NODE = 2

T = TypeVar("T")


def run(
    cmd: Sequence[str],
    timeout: float = 30,
    *,
    check: bool = True,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command, optionally as another user; its output comes back as text.

    Raises AssertionError with the command's output when `check` is set and it fails, TimeoutExpired after `timeout` s.
    """
    result = subprocess.run(
        list(cmd),
        text=True,
        capture_output=True,
        timeout=timeout,
        user=user,
        env=env,
        cwd=cwd,
        input=input,
        check=False,
    )
    assert not check or result.returncode == 0, (
        f"{list(cmd)} returned {result.returncode}: {result.stderr or result.stdout}"
    )
    return result


# The tracker that all tests see; those about signals see the other one too, where the machine allows it.
PROCTRACK = os.environ.get("LLMOPS_PROCTRACK", "linuxproc")
STOCK = {
    "LLMOPS_KILLWAIT": os.environ.get("LLMOPS_KILLWAIT", "30"),
    "LLMOPS_SLURMD_TIMEOUT": os.environ.get("LLMOPS_SLURMD_TIMEOUT", "20"),
    "LLMOPS_PROCTRACK": PROCTRACK,
    "LLMOPS_SLURM_CONF": "",
}


def dev_cluster(command: str, timeout: float = 600, **settings: str) -> str:
    """Run slurm/dev-cluster.sh up|down|status|reset and return what it printed; `settings` are LLMOPS_ variables."""
    return run([str(SCRIPT), command], timeout, env={**os.environ, **settings}).stdout


@contextlib.contextmanager
def settings(**changes: str) -> Iterator[None]:
    """The cluster with other settings of dev-cluster.sh while the block runs; the nodes are idle before and after.

    Daemons are restarted: what slurmd counts down for a job, such as KillWait, is lost.
    """
    try:
        dev_cluster("up", **changes)
        dev_cluster("reset")
        yield
    finally:
        dev_cluster("up", **{name: STOCK[name] for name in changes})
        dev_cluster("reset")


def show_config(name: str) -> str:
    """A value of `scontrol show config`."""
    for line in run(["scontrol", "show", "config"]).stdout.splitlines():
        if line.split("=")[0].strip() == name:
            return line.split("=", 1)[1].strip()
    raise AssertionError(f"scontrol show config does not name {name}")


def proctrack() -> str:
    """Who tracks the processes of jobs now: linuxproc or cgroup."""
    return show_config("ProctrackType").removeprefix("proctrack/")


def cgroup_problem() -> str | None:
    """Why this machine has no cgroups that SLURM could make; None when it has."""
    root = Path("/sys/fs/cgroup")
    hierarchy = root / "freezer" if (root / "freezer").is_dir() else root
    if not (hierarchy / "cgroup.procs").exists():
        return f"{hierarchy} is no cgroup hierarchy"
    probe = hierarchy / f"llmops-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"{hierarchy}: {error.strerror}"
    return None


def wait_for(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Poll until `predicate()` is true and return its value.

    Raises AssertionError that names what was awaited and the last value seen after `timeout` s.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}; last seen: {value!r}"
        time.sleep(0.1)
    return value


def submit(
    script: str, *options: str, user: str | None = None, cwd: Path | str = "/tmp", env: Mapping[str, str] | None = None
) -> str:
    """Submit the text of a batch script (a `#!` line is added if it has none) and return the job id.

    Without an --output among the options what the job prints goes nowhere.
    """
    if not script.startswith("#!"):
        script = "#!/bin/bash\n" + script
    output = () if any(o.startswith(("--output", "-o")) for o in options) else ("--output=/dev/null",)
    result = run(["sbatch", "--parsable", *output, *options], user=user, cwd=cwd, env=env, input=script)
    return result.stdout.strip().split(";")[0]


def parse_job(line: str) -> dict[str, str]:
    """One line of `scontrol -o show job` as a dict; values may hold blanks and equal signs."""
    fields = re.split(r" (?=[A-Z][A-Za-z:/]*=)", line.strip())
    return dict(field.rstrip(" ").split("=", 1) for field in fields if "=" in field)


def jobs(jobid: str) -> list[dict[str, str]]:
    """Every record of a job id: one, or one for each element of an array. Empty when slurmctld has forgotten it."""
    result = run(["scontrol", "-o", "show", "job", jobid], check=False)
    if "Invalid job id" in result.stderr:
        return []
    assert result.returncode == 0, result.stderr
    return [parse_job(line) for line in result.stdout.splitlines() if line.strip()]


def job(jobid: str) -> dict[str, str]:
    """The fields of `scontrol -o show job`; empty when slurmctld has forgotten the job."""
    return next(iter(jobs(jobid)), {})


def wait_job(jobid: str, timeout: float = 60, **fields: str) -> dict[str, str]:
    """Wait until the job's fields match regular expressions, as in `wait_job(j, JobState="RUNNING|COMPLETING")`."""
    seen: dict[str, str] = {}

    def matches() -> bool:
        seen.clear()
        seen.update(job(jobid))
        return all(re.fullmatch(pattern, seen.get(name, "")) for name, pattern in fields.items())

    deadline = time.monotonic() + timeout
    while not matches():
        shown = {name: seen.get(name) for name in ("JobState", "Reason", "Restarts", "StartTime", "ExitCode", *fields)}
        assert time.monotonic() < deadline, f"waited {timeout} s for job {jobid} to have {fields}; last seen: {shown}"
        time.sleep(0.1)
    return seen


def wait_running(jobid: str, timeout: float = 60) -> dict[str, str]:
    """Wait until the job runs."""
    return wait_job(jobid, timeout, JobState="RUNNING")


def wait_file(path: Path, timeout: float = 60) -> str:
    """Wait until the file holds a full line and return its text."""

    def text() -> str:
        content = path.read_text() if path.exists() else ""
        return content if content.endswith("\n") else ""

    return wait_for(text, timeout, f"a line in {path}")


def requeue(jobid: str) -> None:
    """What an administrator's `scontrol requeue` does: TERM, KILL after KillWait, pending again."""
    run(["scontrol", "requeue", jobid])


def preempt(nodes: int | str = len(NODES), seconds: float = 2) -> str:
    """Submit a job of high priority that takes whole nodes (a number, or names as in "n1,n2") and return its id."""
    where = [f"--nodes={nodes}"] if isinstance(nodes, int) else [f"--nodelist={nodes}"]
    return submit(f"sleep {seconds}", "--partition=high", "--exclusive", *where)


def expire(jobid: str, seconds: int = 5) -> None:
    """Let a running job reach its time limit: slurmctld looks every 30 s, so up to 30 s later than asked."""
    run(["scontrol", "update", f"jobid={jobid}", f"EndTime=now+{seconds}"])


def daemon_pid(name: str) -> int:
    """The pid of "slurmctld", "slurmdbd", "slurmd.n1", … as their pid file has it."""
    return int((STATE_DIR / "run" / f"{name}.pid").read_text())


@contextlib.contextmanager
def frozen(name: str) -> Iterator[None]:
    """A daemon that is alive but answers nobody while the block runs."""
    pid = daemon_pid(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def resume(node: str, timeout: float = 60) -> None:
    """Wait until a node is idle, which it may have to be told when it is down or drained."""

    def idle() -> bool:
        state = run(["sinfo", "-h", "-N", "-p", "low", "-n", node, "-o", "%T"]).stdout.strip()
        if state.startswith(("down", "drain")):
            # Refused when the node came back by itself in between (ReturnToService=2).
            run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
        return state == "idle"

    wait_for(idle, timeout, f"{node} to be idle again")


@contextlib.contextmanager
def node_down(node: str) -> Iterator[None]:
    """A node that the administrator has set down; it is back and idle after the block."""
    run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])
    try:
        yield
    finally:
        resume(node)


def accounting(jobid: str, *fields: str, timeout: float = 60, until: str = r"(?!PENDING|RUNNING)\w+.*") -> list[str]:
    """The last row of `sacct -X` once its state matches `until`; slurmdbd hears of changes a moment later."""
    wanted = ["state", *fields]

    def row() -> list[str]:
        lines = run(["sacct", "-X", "-n", "-P", "-j", jobid, "-o", ",".join(wanted)]).stdout.splitlines()
        values = lines[-1].split("|") if lines else []
        return values if values and re.fullmatch(until, values[0]) else []

    return wait_for(row, timeout, f"sacct to show job {jobid} as {until}")


def attempts(jobid: str) -> list[str]:
    """The state of each attempt of a job that was requeued, oldest first."""
    return run(["sacct", "-D", "-X", "-n", "-P", "-j", jobid, "-o", "state"]).stdout.split("\n")[:-1]


def queue() -> list[str]:
    """`<job id> <state>` of every job in the queue, arrays expanded."""
    return run(["squeue", "-h", "-r", "-o", "%i %T"]).stdout.splitlines()


def cancel_all(timeout: float = 60) -> None:
    """Cancel every job of every user and wait until the queue is empty."""

    def empty() -> bool:
        # Arrays by their own id: that of an element alone is not always known to scancel.
        ids = sorted(set(run(["squeue", "-h", "-o", "%F"]).stdout.split()))
        if ids:
            run(["scancel", *ids], check=False)
        return not ids

    wait_for(empty, timeout, "an empty queue")


def processes_with_env(key: str, value: str) -> list[int]:
    """The pids whose environment at exec held `key=value`: finds ranks that outlived their job."""
    wanted = f"{key}={value}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or belongs to somebody else
        if wanted in variables:
            found.append(int(environ.parent.name))
    return sorted(found)
