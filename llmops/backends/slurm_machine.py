"""The machine that has SLURM's commands: this one, or a login node over SSH."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llmops.backends.slurm_limits import file_system, kind_of
from llmops.errors import ClusterError
from llmops.runs.ssh_store import Host
from llmops.ssh.session import Lost

CALL_TIMEOUT_S = 60.0
# By these variables users give SLURM's commands other defaults. What is asked for is in the arguments.
DROPPED = ("SLURM_TIME_FORMAT", "SQUEUE_", "SINFO_", "SACCT_", "SBATCH_")
NO_ANSWER = 124  # the code of a command that did not answer in time


class Machine(Protocol):
    """Where SLURM's commands are."""

    python: str  # what starts a supervisor there, where the config names none

    def call(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
        text: str = "",
        timeout: float = CALL_TIMEOUT_S,
        once: bool = False,
    ) -> tuple[int, str, str]:
        """Run a SLURM command, with ``text`` as its input: exit code, output, errors on one line.

        ``env`` is set and ``hidden`` is not inherited. ``once``: carried out at most once. :data:`NO_ANSWER` when it
        did not answer in time.
        """

    def absolute(self, path: str) -> Path:
        """A path of the user's, relative to where they are, or to their home on a login node."""

    def is_folder(self, path: Path) -> bool:
        """Whether it is one."""

    def place(self, path: str) -> tuple[str, str]:
        """The file system that a path is on, and the machine's name."""


class Here:
    """This machine."""

    python = sys.executable

    def call(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
        text: str = "",
        timeout: float = CALL_TIMEOUT_S,
        once: bool = False,
    ) -> tuple[int, str, str]:
        full = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)} | dict(env or {})
        for name in hidden:
            full.pop(name, None)
        try:
            done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=timeout, env=full)
        except FileNotFoundError as error:
            raise ClusterError(
                f"{command[0]} is not on PATH: this machine is no SLURM client; run llmops on a login node, or name "
                "one in cluster.host"
            ) from error
        except subprocess.TimeoutExpired:
            return NO_ANSWER, "", _silent(command[0], timeout)
        return done.returncode, done.stdout.decode("utf-8", "replace"), _line(done.stderr)

    def absolute(self, path: str) -> Path:
        return Path(path).expanduser().absolute()

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def place(self, path: str) -> tuple[str, str]:
        return file_system(Path(path)), socket.gethostname()


class LoginNode:
    """A host whose commands are run over SSH, in the environment of a login there; this one's stays here."""

    python = "python3"

    def __init__(self, host: Host) -> None:
        self.host = host

    def call(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
        text: str = "",
        timeout: float = CALL_TIMEOUT_S,
        once: bool = False,
    ) -> tuple[int, str, str]:
        try:
            code, output, errors = self.host.run(
                command, text.encode(), env=env, dropped=DROPPED, hidden=hidden, timeout_s=timeout, once=once
            )
        except Lost as error:
            return NO_ANSWER, "", f"{command[0]} did not answer: {error}"
        if code == NO_ANSWER and not errors:
            return NO_ANSWER, "", _silent(command[0], timeout)
        if code == 127 and not errors:
            raise ClusterError(
                f"{self.host.address}: {command[0]} is not on PATH there, nor in a login shell: name a login node of "
                "the cluster"
            )
        return code, output.decode("utf-8", "replace"), _line(errors)

    def absolute(self, path: str) -> Path:
        return Path(self.host.home, self.host.absolute(f"/{path}") if path.startswith("~") else path)

    def is_folder(self, path: Path) -> bool:
        return bool(self._look(str(path))["folder"])

    def place(self, path: str) -> tuple[str, str]:
        found = self._look(path)
        return kind_of(Path(found["nearest"]), found["mounts"]), found["host"]

    def _look(self, path: str) -> dict[str, str]:
        found: dict[str, str] = self.host.ask("place", path=path)[0]
        return found


def _silent(program: str, timeout: float) -> str:
    return f"{program} did not answer within {timeout:.0f} s"


def _line(errors: bytes) -> str:
    return " ".join(errors.decode("utf-8", "replace").split())
