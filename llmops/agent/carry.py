"""How the supervisor travels where no folder is shared: on the standard input of the program that starts it."""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
from typing import IO

# Keeps the zipapp in memory: nothing to clean up on the node. Run as `python -c BOOTSTRAP arguments < base64`.
BOOTSTRAP = (
    "import base64,os,sys;f=os.memfd_create('llmops-agent',0);"
    "os.write(f,base64.b64decode(sys.stdin.buffer.read()));os.dup2(os.open(os.devnull,os.O_RDONLY),0);"
    "os.execv(sys.executable,[sys.executable,'/proc/self/fd/%d'%f,*sys.argv[1:]])"
)

# Starts the command that follows it with stop signals ignored. A Python needs some 50 ms until it has its handlers, and
# a signal that comes sooner, as where a preemption meets a job that has just started, would kill it: a node lost for
# nothing. What is ignored stays so across exec, until the program installs its own handlers.
DEAF_START = ("/bin/sh", "-c", "trap '' TERM USR1 USR2 INT HUP; exec \"$@\"", "sh")


def embed(zipapp: bytes) -> str:
    """The zipapp as text that :data:`BOOTSTRAP` reads."""
    return base64.encodebytes(zipapp).decode("ascii")


def starter(python: str) -> tuple[list[str], int | IO[bytes]]:
    """Command line that starts this very program again, on any node, and its standard input."""
    own = sys.argv[0]
    if not own.startswith("/proc/self/fd/"):
        return [python, own], subprocess.DEVNULL
    source = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the last reference to it)
    with open(own, "rb") as file:
        source.write(embed(file.read()).encode("ascii"))
    source.seek(0)
    return [python, "-c", BOOTSTRAP], source
