"""A rank's handle on its writer process: starts it, sends requests, collects replies. Free of torch."""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.messages import Leave, Reply, Request

HERE = str(Path(__file__).parents[2])  # the writer is of the same code as the rank
REPLIES = msgspec.json.Decoder(Reply)
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
        # A pipe holds little, and a writer that is stuck takes nothing out of it.
        self._outgoing: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="to the writer process", daemon=True)
        self._sender.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Is it still there?"""
        return self._process.poll() is None

    def send(self, request: Request) -> None:
        """Never waits. That the writer is gone, :meth:`replies` tells."""
        self._outgoing.put(request)

    def _send_all(self) -> None:
        with contextlib.suppress(OSError):  # it is gone
            while (request := self._outgoing.get()) is not None:
                self._in.write(msgspec.json.encode(request) + b"\n")
                self._in.flush()
        with contextlib.suppress(OSError):
            self._in.close()

    def replies(self, wait_s: float = 0.0) -> list[Reply]:
        """What it has said since the last call; waits up to ``wait_s``. Raises CheckpointError when it is gone."""
        if not self._selector.select(wait_s):
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
        self._outgoing.put(None)
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILLED_S)
        self._sender.join(KILLED_S)
        self._selector.close()
        self._out.close()
        return self._process.returncode

    def _gone(self) -> str:
        until = time.monotonic() + LEAVE_S
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return f"the writer process of this rank has ended with code {self._process.poll()}"
