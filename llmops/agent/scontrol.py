"""Asking and telling the SLURM controller from inside a job.

Every call has a deadline; a controller that is down is an answer too.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time

from llmops.agent.policy.slurm import JobFacts, parse_job

CALL_TIMEOUT_S = 25.0


def job_ref(environ: dict[str, str]) -> str:
    """How the controller must be asked for this job.

    The last element of an array has the array's own id as SLURM_JOB_ID, and requeueing that would requeue every
    element.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ["SLURM_JOB_ID"]


def clean_environment(environ: dict[str, str]) -> dict[str, str]:
    """An environment in which SLURM's commands print what is parsed here, whatever the user's taste in time formats."""
    return {name: value for name, value in environ.items() if name not in ("SLURM_TIME_FORMAT", "SQUEUE_FORMAT")}


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def call(*command: str) -> tuple[int, str]:
    """Run a SLURM command. Returns its exit code and what it printed, errors included; 124 when it did not answer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=CALL_TIMEOUT_S,
            env=clean_environment(dict(os.environ)),
            # Some process trackers signal the whole tree: a second TERM would kill the question that the first raised.
            preexec_fn=_ignore_signals,
        )
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} did not answer within {CALL_TIMEOUT_S:.0f} s"
    except FileNotFoundError:
        return 127, f"{command[0]} is not on this node"
    return done.returncode, done.stdout.decode("utf-8", "replace").strip()


def parse_fields(text: str) -> dict[str, str]:
    """``Key=value`` pairs of one ``scontrol -o show`` line.

    Values with blanks (Comment, JobName) keep only their first word.
    """
    return dict(re.findall(r"(?:^|\s)([A-Z][A-Za-z/:]*)=(\S*)", text))


def show_job(ref: str, patience_s: float = 60.0) -> JobFacts:
    """What the controller says of the job; asked again while it does not answer, for ``patience_s`` at most."""
    deadline = time.monotonic() + patience_s
    while True:
        code, text = call("scontrol", "-o", "show", "job", ref)
        if code == 0:
            return parse_job(parse_fields(text))
        if time.monotonic() > deadline:
            return parse_job({})
        time.sleep(1)


def kill_wait(partition: str) -> tuple[float, float]:
    """KillWait of the cluster and GraceTime of ``partition`` in seconds; the defaults (30, 0) where it does not say."""
    _, config = call("scontrol", "show", "config")
    found = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
    _, text = call("scontrol", "-o", "show", "partition", partition)
    grace = parse_fields(text).get("GraceTime", "0")
    return float(found.group(1)) if found else 30.0, float(grace) if grace.isdigit() else 0.0


def host_names(nodelist: str) -> list[str]:
    """The nodes of a compressed list such as ``n[1-3,7]``."""
    code, text = call("scontrol", "show", "hostnames", nodelist)
    return text.split() if code == 0 else [nodelist]


def node_address(node: str) -> str:
    """The address at which the cluster itself reaches ``node``.

    A host name may resolve to loopback on its own machine.
    """
    code, text = call("scontrol", "-o", "show", "node", node)
    name = parse_fields(text).get("NodeAddr", node) if code == 0 else node
    return socket.gethostbyname(name)


def requeue(ref: str) -> str | None:
    """Ask for the job to be run again. None when accepted, else why not."""
    for _ in range(3):
        code, text = call("scontrol", "requeue", ref)
        if code == 0 or "pending" in text.lower():
            return None
        if "disabled" in text or "Invalid" in text or "denied" in text:
            return text
        time.sleep(1)
    return text


def cut_wait(ref: str, delay_s: int, patience_s: float = 15.0) -> bool:
    """Let a requeued job start in ``delay_s`` seconds instead of after the controller's two minutes.

    Refused while the job still counts as running, accepted once it is completing: hence asked again. ``delay_s`` must
    outlast the end of the job, and a start in the second of the kill would revoke its credential: not less than 3.
    """
    deadline = time.monotonic() + patience_s
    while True:
        code, _ = call("scontrol", "update", f"jobid={ref}", f"StartTime=now+{max(delay_s, 3)}")
        if code == 0:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def submit_successor(script: str, tag: str, after: str, submission: int, index: str | None = None) -> str | None:
    """Queue ``script`` again as a new job behind this one; its job id, or None when the controller refused.

    ``index``: of the one element that the new job has, where the script is an array's.
    """
    inside = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SBATCH_"))]
    command = ["env", *(f"--unset={name}" for name in inside), "sbatch", "--parsable", f"--job-name={tag}"]
    command += [f"--array={index}"] if index is not None else []
    code, text = call(*command, f"--dependency=afterany:{after}", script, str(submission))
    return text.splitlines()[-1].split(";")[0] if code == 0 and text else None
