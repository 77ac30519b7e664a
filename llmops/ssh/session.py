"""One ssh process with a program of ours at its other end, asked by any number of threads at a time.

A request and an answer are each a line of JSON, which says how many bytes of data follow it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

from llmops.errors import ClusterError
from llmops.ssh import READY, command, trouble
from llmops.ssh.address import Address

READY_S, TYPING_S = 60.0, 300.0  # until then; more where the user types a password
MOST_S = 900.0  # for any one request, however much moves
SLOWEST = 50_000  # bytes per second of what is sent; less is taken for nothing
CHUNK = 1 << 16
_BOOT = (  # runs modules that were sent as text, in order, as if they had been imported
    "import types\n"
    "for name, text in json.loads(sys.stdin.buffer.readline()):\n"
    "    module = types.ModuleType(name)\n"
    "    module.__path__ = []\n"
    "    sys.modules[name] = module\n"
    "    exec(compile(text, name, 'exec'), module.__dict__)\n"
    "module.main()\n"
)


class Lost(ClusterError):
    """The connection ended, or was given up, with a request unanswered: whether it was carried out is not known."""


class _Answer:
    """What one request waits for."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.fields: dict[str, Any] | None = None
        self.data = b""


class Session:
    """The other end's modules are sent as text; nothing is written there. Raises ``UserError`` or ``ClusterError``."""

    def __init__(self, address: Address, modules: list[tuple[str, str]], interactive: bool) -> None:
        self.address = address
        self.requests = 0
        self._lock = threading.Lock()  # of the pending requests
        self._writing = threading.Lock()
        self._pending: dict[int, _Answer] = {}
        self._ready = threading.Event()  # the greeting has come, or nothing more will
        self._greeting: dict[str, Any] | None = None
        self._lost = ""
        self._moved = time.monotonic()
        self._said = command.scratch()
        line = command.command(address, interactive)
        # Ctrl-C is meant for llmops; but who reads a password needs the terminal's own session.
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=not interactive,
            bufsize=0,
        )
        atexit.register(self.close)
        threading.Thread(target=self._read, daemon=True).start()
        boot = json.dumps(_BOOT).encode() + b"\n" + json.dumps(modules).encode() + b"\n"
        try:
            with contextlib.suppress(OSError):  # an ssh that has ended says why, below
                self._write(boot)
            limit = TYPING_S if interactive else READY_S
            in_time = self._ready.wait(limit)
            if self._greeting is None:
                raise self._failure(limit if not in_time else None)
        except BaseException:
            self.close()
            raise

    @property
    def greeting(self) -> dict[str, Any]:
        """What the other end said of itself."""
        return self._greeting or {}

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._lost

    def ask(self, fields: Mapping[str, Any], data: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """One request. Raises :class:`Lost`, also where nothing at all has moved for ``timeout_s``."""
        answer = _Answer()
        with self._lock:
            if self._lost:
                raise Lost(self._lost)
            self.requests += 1
            number = self.requests
            self._pending[number] = answer
        begun = self._moved = time.monotonic()
        sending_s = len(data) / SLOWEST  # much of it may wait in buffers that nobody here sees
        try:
            self._write(json.dumps({**fields, "id": number, "size": len(data)}).encode() + b"\n", data)
        except OSError:
            self._give_up(f"{self.address}: the connection was lost")
        while not answer.there.wait(min(timeout_s, 5.0)):
            now = time.monotonic()
            if now - self._moved > timeout_s + sending_s or now - begun > MOST_S + sending_s:
                self._give_up(f"{self.address}: no answer for {now - max(self._moved, begun):.0f} s")
        if answer.fields is None:
            raise Lost(self._lost)
        return answer.fields, answer.data

    def close(self) -> None:
        """End the ssh process; the connection that it shares stays for a while."""
        atexit.unregister(self.close)
        self._give_up(f"{self.address}: the connection was closed")
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _give_up(self, why: str) -> None:
        with self._lock:
            self._lost = self._lost or why
            left, self._pending = self._pending, {}
        if self._process.poll() is None:
            self._process.kill()
        for answer in left.values():
            answer.there.set()
        self._ready.set()

    def _write(self, *parts: bytes) -> None:
        stream: IO[bytes] | None = self._process.stdin
        assert stream is not None
        with self._writing:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[stream.write(view[:CHUNK]) or 0 :]
                    self._moved = time.monotonic()

    def _read(self) -> None:
        """On a thread of its own, until the other end is gone."""
        assert self._process.stdout is not None
        try:
            with os.fdopen(os.dup(self._process.stdout.fileno()), "rb") as stream:
                for line in stream:
                    if line.startswith(READY):
                        self._greeting = json.loads(line[len(READY) :])
                        self._ready.set()
                        break
                for line in stream:
                    fields = json.loads(line)
                    data = bytearray()
                    while len(data) < fields["size"]:
                        more = stream.read1(min(CHUNK, fields["size"] - len(data)))
                        if not more:
                            return
                        data += more
                        self._moved = time.monotonic()
                    self._moved = time.monotonic()
                    with self._lock:
                        answer = self._pending.pop(fields["id"], None)
                    if answer is not None:
                        answer.fields, answer.data = fields, bytes(data)
                        answer.there.set()
        finally:
            self._give_up(f"{self.address}: the connection was lost")

    def _failure(self, limit: float | None) -> Exception:
        if limit is not None:
            return ClusterError(f"{self.address}: it did not answer within {limit:.0f} s; try again later")
        code = self._process.wait()
        size = os.fstat(self._said).st_size
        return trouble.explain(self.address, code, os.pread(self._said, size, 0).decode("utf-8", "replace"))
