"""A rank's handle on its writer process: starts it, sends requests, collects replies. Free of torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import selectors
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.messages import Leave, Reply, Request

HERE = str(Path(__file__).parents[2])  # the writer is of the same code as the rank
REPLIES = msgspec.json.Decoder(Reply)
PIPE_BYTES = 1 << 20  # what a pipe may hold at most where nobody has allowed more
SEND_S = 0.2  # for a writer to take what does not fit: what it does not take by then has to wait
LEAVE_S = 5.0  # a writer with nothing to do is gone in milliseconds
KILLED_S = 1.0  # one that was killed too, unless it is stuck in the kernel: then nobody waits for it


class WriterProcess:
    """Started at once, so that its imports are done before the first save. ``descriptor`` is the shared memory."""

    def __init__(self, url: str, rank: int, descriptor: int) -> None:
        # -P: whatever lies in the working directory is not part of the program.
        command = [sys.executable, "-P", "-m", "llm.checkpoint.writer", url, str(rank), str(descriptor)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[descriptor],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._rest = b""
        self._unsent = bytearray()  # requests, or the rest of one, that the pipe has not taken
        os.set_blocking(self._in.fileno(), False)  # a writer that is stuck takes nothing out of it
        with contextlib.suppress(OSError):  # this user has too many of them
            fcntl.fcntl(self._in.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Is it still there?"""
        return self._process.poll() is None

    def send(self, request: Request) -> bool:
        """Returns whether the pipe has taken it: then the writer will hear of it even if this process dies.

        Waits hardly for a writer that is stuck: :meth:`replies` sends the rest, and tells that the writer is gone.
        """
        self._unsent += msgspec.json.encode(request) + b"\n"
        return self._push(SEND_S)

    def _push(self, wait_s: float) -> bool:
        until = time.monotonic() + wait_s
        while self._unsent:
            try:
                del self._unsent[: os.write(self._in.fileno(), self._unsent)]
            except BlockingIOError:
                if (left := until - time.monotonic()) <= 0:
                    return False
                select.select([], [self._in], [], left)
            except OSError:  # it is gone
                return False
        return True

    def replies(self, wait_s: float = 0.0) -> list[Reply]:
        """What it has said since the last call; waits up to ``wait_s``. Raises CheckpointError when it is gone."""
        if not self._selector.select(wait_s if self._push(wait_s) else 0):
            if not self.alive:
                raise CheckpointError(self._gone())
            return []
        data = self._out.read()
        if data == b"":
            raise CheckpointError(self._gone())
        *lines, self._rest = (self._rest + (data or b"")).split(b"\n")
        return [REPLIES.decode(line) for line in lines]

    def close(self, wait_s: float = LEAVE_S) -> int | None:
        """Let it finish what it is doing, for at most ``wait_s``, and leave; then make it. Returns its exit code."""
        self.send(Leave())
        self._in.close()
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILLED_S)
        self._selector.close()
        self._out.close()
        return self._process.returncode

    def _gone(self) -> str:
        until = time.monotonic() + LEAVE_S
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return f"the writer process of this rank has ended with code {self._process.poll()}"
