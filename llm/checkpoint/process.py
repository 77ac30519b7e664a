"""A rank's handle on its writer process: starts it, sends requests, collects replies. Free of torch."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from llm.checkpoint.format import CheckpointError
from llm.checkpoint.messages import Reply, Request

HERE = str(Path(__file__).parents[2])  # the writer is of the same code as the rank
REPLIES = msgspec.json.Decoder(Reply)
LEAVE_S = 5.0  # a writer with nothing to do is gone in milliseconds


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

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Is it still there?"""
        return self._process.poll() is None

    def send(self, request: Request) -> None:
        """Raises CheckpointError when the writer is gone."""
        try:
            self._in.write(msgspec.json.encode(request) + b"\n")
            self._in.flush()
        except OSError:
            raise CheckpointError(self._gone()) from None

    def replies(self, wait_s: float = 0.0) -> list[Reply]:
        """What it has said since the last call; waits up to ``wait_s``. Raises CheckpointError when it is gone."""
        if not self._selector.select(wait_s):
            return []
        data = self._out.read()
        if data == b"":
            raise CheckpointError(self._gone())
        *lines, self._rest = (self._rest + (data or b"")).split(b"\n")
        return [REPLIES.decode(line) for line in lines]

    def close(self, wait_s: float = LEAVE_S) -> None:
        """Let it finish what it is doing, for at most ``wait_s``, and leave; then make it."""
        with contextlib.suppress(OSError):
            self._in.close()
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._selector.close()
        self._out.close()

    def _gone(self) -> str:
        until = time.monotonic() + LEAVE_S
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return f"the writer process of this rank has ended with code {self._process.poll()}"
