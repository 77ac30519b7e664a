"""The command line of the system's ssh: the user's own configuration, and one connection that all commands share."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from llmops.errors import UserError
from llmops.ssh.address import Address

CONNECT_S = 15  # until the host has answered
ALIVE_S, ALIVE_MISSED = 15, 3  # a connection that is silent for the product of these is dead
PERSIST_S = 600  # how long a connection waits for the next command
MAX_SOCKET = 100  # of the 108 bytes that a socket's path may have
_HASH, _RANDOM = 40, 17  # ssh's own name for the connection, and what it appends to that while it makes the socket
# The newest of these that is there and not too old serves the files; what jobs run in is cluster.python.
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(14, 8, -1)))
TOO_OLD, NO_PYTHON = 97, 98  # exit codes that nothing else at the other end has
# Also a Python of the time before 3.9 can read it.
_START = "import sys,json;sys.version_info<(3,9)and sys.exit(97);exec(json.loads(sys.stdin.buffer.readline()))"


def command(address: Address, interactive: bool) -> list[str]:
    """ssh to ``address``, starting a Python that executes what it reads. ``interactive``: it may ask the user.

    Raises :class:`UserError`.
    """
    options = {
        "BatchMode": "no" if interactive else "yes",
        "ConnectTimeout": str(CONNECT_S),
        "ServerAliveInterval": str(ALIVE_S),
        "ServerAliveCountMax": str(ALIVE_MISSED),
        "ClearAllForwardings": "yes",
        "RemoteCommand": "none",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
    }
    start = _ssh(address)
    if _control_path(start, address) is None:
        options |= {
            "ControlMaster": "auto",
            "ControlPath": f"{_folder()}/%C",
            "ControlPersist": str(PERSIST_S),
        }
    chosen = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    # In quotes that every login shell reads alike: there is no quote, backslash or exclamation mark in it.
    return [*start, *chosen, "-a", "-x", "--", address.host, f"exec sh -c '{_script()}'"]


def _ssh(address: Address) -> list[str]:
    config = os.environ.get("LLMOPS_SSH_CONFIG")
    return [
        "ssh",
        *(["-F", config] if config else []),
        *(["-l", address.user] if address.user else []),
        *(["-p", str(address.port)] if address.port else []),
    ]


def _control_path(start: list[str], address: Address) -> str | None:
    """The user's own, where there is one: a login with a second factor is shared with it, and none is asked again."""
    try:
        done = subprocess.run(
            [*start, "-G", "--", address.host], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError as error:
        raise UserError("there is no ssh on PATH: install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{address}: `ssh -G` did not finish in 30 s; look at your ssh configuration") from error
    if done.returncode:
        raise UserError(f"{address}: ssh does not take its configuration: {' '.join(done.stderr.split())}")
    found = re.search(r"^controlpath (?!none$)(.+)$", done.stdout, re.MULTILINE)
    return found[1] if found else None


def _folder() -> Path:
    """A folder for sockets that only this user can enter. Raises :class:`UserError` where somebody else has it."""
    config = os.environ.get("LLMOPS_SSH_CONFIG")
    suffix = "-" + hashlib.sha256(os.path.realpath(config).encode()).hexdigest()[:8] if config else ""
    name = f"llmops-ssh-{os.getuid()}{suffix}"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    fits = len(f"{runtime}/{name}/".encode()) + _HASH + _RANDOM <= MAX_SOCKET
    usable = fits and re.fullmatch(r"/[\w./+-]+", runtime) and Path(runtime).is_dir() and os.access(runtime, os.W_OK)
    folder = Path(runtime if usable else "/tmp", name)  # noqa: S108 - checked below; the default is often too long
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(f"{folder} is not a folder of yours alone, so no connection is kept in it; remove it")
    return folder


def _script() -> str:
    """For sh: the first Python that is new enough. One that is too old leaves what it is sent to the next."""
    chosen = os.environ.get("LLMOPS_SSH_PYTHON")
    if chosen is not None and not re.fullmatch(r"[\w./+~-]+", chosen, re.ASCII):
        raise UserError(f"LLMOPS_SSH_PYTHON={chosen!r}: give the name or path of a Python on the host")
    return (
        f"f={NO_PYTHON}; for p in {chosen or ' '.join(PYTHONS)}; do if command -v $p >/dev/null 2>&1; then "
        f'$p -I -c "{_START}"; c=$?; test $c = {TOO_OLD} || exit $c; f={TOO_OLD}; fi; done; exit $f'
    )


def is_interactive() -> bool:
    """Whether there is a terminal, at which somebody can type a password or agree to a host key."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def scratch() -> int:
    """Descriptor of a nameless file for what ssh says: a pipe would stay open as long as the shared connection."""
    descriptor, path = tempfile.mkstemp(prefix="llmops-ssh-")
    Path(path).unlink()
    return descriptor
