"""Running a program that a model has written: in a process of its own, with little to take and little to break.

Limits of CPU time, address space, file size, open files and processes (none of its own); an empty folder as its working
directory; no environment; no network and no look at other processes' memory or environment where the kernel has user
namespaces for us; another user where this one is root; killed with all that it started when its time is over. It is no
virtual machine: it can read the files that anybody on the machine can read. Linux alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from llm.utils.config import ConfigError

OUTPUT = 1 << 20  # bytes that a program may write into a file, its output included
OPEN_FILES = 64
TOLD = 300  # characters of an error
CLOCK = 2.0  # seconds on the clock for each second of CPU time: other programs run too

# What the process does before it becomes the program's: the limits are set from inside, so that nothing has to run
# between fork and exec of a process with threads. CLONE_NEWUSER | CLONE_NEWNET; PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG.
BOOT = r"""
import ctypes, json, os, resource, sys
libc = ctypes.CDLL(None, use_errno=True)
job = json.loads(sys.stdin.buffer.read())
cut = False
if os.geteuid() == 0:
    cut = libc.unshare(0x40000000) == 0
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cut = libc.unshare(0x10000000 | 0x40000000) == 0 or cut
libc.prctl(38, 1, 0, 0, 0)
libc.prctl(1, 9, 0, 0, 0)
for kind, most in (
    (resource.RLIMIT_CPU, job["seconds"]), (resource.RLIMIT_AS, job["memory"]), (resource.RLIMIT_FSIZE, job["output"]),
    (resource.RLIMIT_NOFILE, job["files"]), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(kind, (most, most))
def run(program, done, write=os.write, flush=sys.stdout.flush):
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    flush()
    write(1, done)
run(job["program"], (job["token"] + ("cut" if cut else "open")).encode())
"""


class Ran(NamedTuple):
    """What became of a program: whether it came to its end, why not in a line, and whether it had no network."""

    passed: bool
    why: str
    network_cut: bool


def run(program: str, seconds: float, memory_mb: int) -> Ran:
    """Run Python source to its end. ``seconds`` of CPU time, and twice that on the clock."""
    token = secrets.token_hex(16)  # it comes through standard input: a program that leaves early does not know it
    job = {
        "program": program, "token": token, "seconds": max(round(seconds), 1), "memory": memory_mb << 20,
        "output": OUTPUT, "files": OPEN_FILES,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="llm-sandbox-") as folder, tempfile.TemporaryFile() as output:
        Path(folder).chmod(0o777)  # the program may be another user's
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", BOOT],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        late = False
        try:
            process.communicate(json.dumps(job).encode(), timeout=CLOCK * seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        written = output.read(OUTPUT + len(token) + 8).decode(errors="replace")
    text, found, network = written.rpartition(token)
    if found and process.returncode == 0 and not late:
        return Ran(True, "", network == "cut")
    return Ran(False, _why(process.returncode, late, text if found else written), network == "cut")


def _why(code: int, late: bool, text: str) -> str:
    if late or code == -signal.SIGXCPU:
        return "timed out"
    lines = [line for line in text.splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return lines[-1][:TOLD] if lines and code else "left before its end"


def check() -> bool:
    """Can programs be run here, and is the network cut off? Raises ConfigError where they cannot be run at all."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("eval.run_code=true: programs are run under limits that only Linux has")
    found = run("import math", 10.0, 1024)
    if not found.passed:
        raise ConfigError(f"eval.run_code=true: no program can be run in the sandbox here: {found.why}")
    return found.network_cut
