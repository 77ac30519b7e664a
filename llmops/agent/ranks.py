"""Starting the ranks of one node with the standard environment."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmops.agent import torchrun
from llmops.agent.processes import MARKER


class SpecError(Exception):
    """The job cannot start as it is described. One line."""


@dataclass(frozen=True)
class Placement:
    """Where one rank runs and how it finds the others."""

    rank: int
    local_rank: int
    node: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_secrets(path: str | None, names: list[str]) -> dict[str, str]:
    """Values of the named secrets from their file, which nobody but its owner may read."""
    if not names:
        return {}
    if not path:
        raise SpecError(f"the job names secrets ({', '.join(names)}) but no file that holds them")
    try:
        status = os.stat(path)
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SpecError(f"{path} can be read by others (mode {status.st_mode & 0o777:o}): chmod 600 it")
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise SpecError(f"the secrets' file cannot be read: {error}") from error
    missing = [name for name in names if name not in values]
    if missing:
        raise SpecError(f"{path} does not hold {', '.join(missing)}")
    return {name: values[name] for name in names}


def environment(
    spec: dict[str, Any],
    place: Placement,
    attempt: dict[str, Any],
    control: str,
    code: str | None,
    agent_id: str,
    offered: str | None = None,
) -> dict[str, str]:
    """The environment of one rank: the job's own, the run's, and what torch.distributed expects.

    ``offered``: a folder of modules for programs that are not ours.
    """
    env = dict(os.environ)
    if spec["kind"] == "command":
        env.update(torchrun.environment(spec, place.node, place.master_addr, place.master_port))
    for name in ("LLMOPS_RENDEZVOUS", "LLMOPS_RENDEZVOUS_TOKEN"):
        env.pop(name, None)
    env.update(spec["env"])
    env.setdefault("OMP_NUM_THREADS", str(spec["threads_per_rank"]))
    env.setdefault("PYTHONUNBUFFERED", "1")
    if path := [each for each in (code, env.get("PYTHONPATH"), offered) if each]:
        env["PYTHONPATH"] = os.pathsep.join(path)
    env.update(
        {
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local_rank),
            "NODE_RANK": str(place.node),
            "GROUP_RANK": str(place.node),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
            "MASTER_ADDR": place.master_addr,
            "MASTER_PORT": str(place.master_port),
            "LLMOPS_RUN_ID": spec["run_id"],
            "LLMOPS_RUN_URL": spec["run_url"],
            "LLMOPS_ATTEMPT": str(attempt["number"]),
            "LLMOPS_NNODES": str(spec["nodes"]),
            "LLMOPS_RESUME_FROM": attempt.get("resume_path") or attempt["resume_from"] or "",
            "LLMOPS_RESUME_STEP": str(attempt["resume_step"]),
            "LLMOPS_CODE": os.path.basename(spec["code_archive"] or "").split(".")[0],  # the snapshot's digest
            "LLMOPS_CONTROL_DIR": control,
            MARKER: agent_id,
        }
    )
    return env


def _before_exec(ignore_signals: bool) -> Callable[[], None]:
    def prepare() -> None:
        # The supervisor's own handlers do not survive exec, but an ignored signal does. Our trainer looks at the stop
        # flag alone, as does torchrun, see there, and some process trackers signal the whole tree; any other program
        # gets the defaults back.
        action = signal.SIG_IGN if ignore_signals else signal.SIG_DFL
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, action)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()

    return prepare


def start_rank(
    spec: dict[str, Any], place: Placement, env: dict[str, str], code: str | None
) -> subprocess.Popen[bytes]:
    """Start one rank in a session of its own, its output in a pipe.

    Raises :class:`SpecError` when it cannot be started.
    """
    work_dir = code or spec["options"].get("work_dir") or os.getcwd()
    try:
        return subprocess.Popen(
            spec["command"],
            env=env,
            cwd=work_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # One thread, and nothing imported after the fork: safe, and the only hook there is between fork and exec.
            preexec_fn=_before_exec(spec["kind"] == "llm" or torchrun.is_torchrun(spec["command"])),
        )
    except FileNotFoundError as error:
        missing = error.filename if error.filename != work_dir else f"the working directory {work_dir}"
        raise SpecError(f"rank {place.rank} cannot be started: {missing} is not there on this node") from error
    except OSError as error:
        raise SpecError(f"rank {place.rank} cannot be started: {error}") from error
