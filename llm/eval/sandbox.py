"""Running a program that a model has written: in a process of its own, with little to take and little to break.

Limits of CPU time, address space, file size, open files, and processes of its own; no environment; killed with all that
it started when its time is over. Where the kernel has user namespaces for us, also: no network, every file system
read-only but for an empty working directory in memory, other processes out of reach. A program of root's becomes
nobody's, if nobody can read this Python. It is no virtual machine: what its user can read, it can. Linux alone.
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

# What the process does before it becomes the program's: from inside, so that nothing has to run between fork and exec
# of a process with threads. unshare(CLONE_NEWUSER | NEWNS | NEWNET | NEWPID), mount_setattr(MOUNT_ATTR_RDONLY), and
# capset() to none.
BOOT = r"""
import ctypes, json, os, resource, sys
libc = ctypes.CDLL(None, use_errno=True)
job = json.loads(sys.stdin.buffer.read())

def nobody():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

def wait(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -code)
    os._exit(code)

def readable():
    pid = os.fork()
    if not pid:
        try:
            nobody()
            open(os.__file__, "rb").close()
            import _decimal, math, random
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0

def isolate(folder):
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(0x10000000 | 0x00020000 | 0x40000000 | 0x20000000):
        return False
    for name, text in ("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    read_only = (ctypes.c_uint64 * 4)(1)
    done = libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None) == 0
    done = done and libc.syscall(442, -100, b"/", 0x8000, ctypes.byref(read_only), 32) == 0
    done = done and libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(6), b"size=64m") == 0
    os.chdir(folder)
    return libc.capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()) == 0 and done

if os.geteuid() == 0 and readable():
    nobody()
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
isolated = isolate(os.getcwd())
if isolated:
    pid = os.fork()  # the first process of the namespace: all others in it end with it
    if pid:
        wait(pid)
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

run(job["program"], (job["token"] + ("isolated" if isolated else "")).encode())
"""


class Ran(NamedTuple):
    """What became of a program: whether it came to its end, why not in a line, and whether namespaces kept it apart."""

    passed: bool
    why: str
    isolated: bool


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
        written = output.read(OUTPUT + len(token) + 16).decode(errors="replace")
    text, found, isolated = written.rpartition(token)
    if found and process.returncode == 0 and not late:
        return Ran(True, "", isolated == "isolated")
    return Ran(False, _why(process.returncode, late, text if found else written), False)


def _why(code: int, late: bool, text: str) -> str:
    if late or code in (-signal.SIGXCPU, -signal.SIGKILL):  # of itself it cannot be killed: CPU time is used up
        return "timed out"
    lines = [line for line in text.splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return lines[-1][:TOLD] if lines and code else "left before its end"


def check() -> bool:
    """Can programs be run here, and do namespaces keep them apart? Raises ConfigError where they cannot be run."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("eval.run_code=true: programs are run under limits that only Linux has")
    found = run("import math", 10.0, 1024)
    if not found.passed:
        raise ConfigError(f"eval.run_code=true: no program can be run in the sandbox here: {found.why}")
    return found.isolated
