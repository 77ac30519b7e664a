"""Killing what a supervisor started, all of it, and nothing else.

Every process that a node agent starts inherits a marker in its environment. Children that detach, change their
session or lose their parent still carry it, so they are found by it, whatever the scheduler's own tracking can see.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection

MARKER = "LLMOPS_AGENT_ID"


def marked(agent_id: str) -> list[int]:
    """Process ids of this user whose environment carries ``agent_id``; zombies and this process excluded."""
    needle = f"{MARKER}={agent_id}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read()
        except OSError:
            # Gone in the meantime, or somebody else's.
            continue
        if needle in environment.split(b"\0"):
            found.append(int(name))
    return found


def kill_marked(agent_id: str, timeout_s: float = 10.0, spare: Collection[int] = ()) -> list[int]:
    """SIGKILL every process marked with ``agent_id``, except those to ``spare``, until none is left; those that
    outlived ``timeout_s`` are returned.

    Repeated, because a process may fork while the list is read. A process in uninterruptible sleep cannot be killed by
    anyone.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.01
    while True:
        alive = [pid for pid in marked(agent_id) if pid not in spare]
        if not alive or time.monotonic() > deadline:
            return alive
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        # Nothing announces the death of somebody else's child: look again after a moment.
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def start_guard(agent_id: str) -> int:
    """Fork a guard that kills everything marked with ``agent_id`` as soon as this process is gone, even by SIGKILL.

    Returns the write end of the pipe whose closing wakes the guard. Must be called while this process has one thread.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(read_end)
        return write_end
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        # Keep the pipe alone: an inherited socket or log would stay open as long as the guard lives.
        if read_end != 3:
            os.dup2(read_end, 3)
        os.closerange(4, 4096)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        while os.read(3, 1):
            pass
        kill_marked(agent_id)
    finally:
        os._exit(0)
