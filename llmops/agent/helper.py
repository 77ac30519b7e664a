"""The helper process that reaches a run store which is no folder: ``python -m llmops.runs.remote URL``.

One JSON object a line on its standard input and output. It is started on first use, and once more should it die.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any

from llmops.agent.rundir import PATIENCE_S, StoreError
from llmops.agent.signals import be_apart

CALL_S = 40.0  # for one answer; the client libraries try again by themselves within it
RESTARTS = 1


class _Lost(Exception):
    """The helper died, or hung and was killed."""


class _Late(Exception):
    """No answer yet, and the caller has no more time."""


class Helper:
    """A client of one helper process. Not for threads: one request at a time."""

    def __init__(self, command: list[str], url: str) -> None:
        self.command, self.url = [*command, "-m", "llmops.runs.remote", url], url
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._requests = self._answers = -1  # its standard input and output
        self._number = 0
        self._buffer = b""

    def call(self, op: str, patience_s: float = PATIENCE_S, call_s: float = CALL_S, **arguments: Any) -> Any:
        """The answer to one request, asked again for ``patience_s`` while the store is out of reach.

        A helper without an answer after ``call_s`` hangs and is replaced, once.

        Raises :class:`StoreError` when it refuses or that time is over.
        """
        deadline = time.monotonic() + patience_s
        pause, losses = 0.5, 0
        while True:
            try:
                reply = self._exchange({"op": op, **arguments}, deadline, call_s)
            except _Late as error:
                raise StoreError(f"{self.url}: the store did not answer within {patience_s:.0f} s") from error
            except _Lost as error:
                losses += 1
                problem = f"{self.url}: {error}"
                if losses > RESTARTS:
                    raise StoreError(problem) from error
            else:
                if "error" not in reply:
                    return reply["value"]
                problem = reply["error"]
                if not reply["again"]:
                    raise StoreError(problem)
            if time.monotonic() + pause > deadline:
                raise StoreError(problem)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def tell(self, op: str, **arguments: Any) -> None:
        """A request without an answer. Never waits: such lines are short, and the pipe holds hundreds."""
        try:
            self._start()
            os.write(self._requests, json.dumps({"op": op, **arguments}).encode() + b"\n")
        except OSError as error:
            print(f"llmops: {self.url}: {op} did not reach the helper: {error}", file=sys.stderr, flush=True)

    def alive(self) -> bool:
        """Whether there is nothing to repair."""
        return self.process is None or self.process.poll() is None

    def close(self, wait_s: float) -> None:
        """Let it finish what it was told and end it."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._kill()

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.starts += 1
        self._buffer = b""
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",  # a folder named llmops in the current one must not be taken for the package
            bufsize=0,
            # One thread, and nothing imported after the fork: safe.
            preexec_fn=be_apart,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._requests, False)

    def _exchange(self, request: dict[str, Any], deadline: float, call_s: float) -> dict[str, Any]:
        """One request and its answer.

        A helper that is late is left alone, unless it had ``call_s``; what it still answers is skipped then.
        """
        self._number += 1
        hung = time.monotonic() + call_s
        try:
            self._start()
            self._send(json.dumps({**request, "id": self._number}).encode() + b"\n", min(deadline, hung))
            return self._receive(min(deadline, hung))
        except _Late as error:
            if time.monotonic() < hung:
                raise
            self._kill()
            raise _Lost(f"the store did not answer within {call_s:.0f} s") from error
        except _Lost:
            self._kill()
            raise
        except OSError as error:
            self._kill()
            raise _Lost(f"{self.command[0]} cannot be started or spoken to: {error}") from error

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            _, ready, _ = select.select([], [self._requests], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise _Late
            data = data[os.write(self._requests, data) :]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while True:
            while b"\n" in self._buffer:
                line, self._buffer = self._buffer.split(b"\n", 1)
                reply: dict[str, Any] = json.loads(line)
                if reply.get("id") == self._number:
                    return reply
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise _Late
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise _Lost(
                    f"the helper ended; is llmops, with what this store needs (such as "
                    f"llmops[s3]), installed for {self.command[-4]}?"
                )
            self._buffer += data

    def _kill(self) -> None:
        if self.process is None:
            return
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.kill()
        self.process.wait(10)
