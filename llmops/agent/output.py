"""Output of one rank: kept in the run directory with the time of each line; secrets are blotted out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

from llmops.agent.rundir import RunDir

TAIL_BYTES = 8192
MAX_LINE = 1 << 16
# What each stored line begins with: UTC, milliseconds, 25 bytes with the space. Read back by whoever shows output.
STAMP = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z ")


def stamp(now: float) -> bytes:
    """The time ``now``, in epoch seconds, as lines begin with it: ``2026-11-23T03:27:00.123Z ``."""
    milliseconds = int(now * 1000)
    return b"%s.%03dZ " % (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000)).encode(),
        milliseconds % 1000,
    )


def unstamped(line: bytes) -> bytes:
    """A stored line as the program wrote it. Lines without a stamp stay as they are."""
    return line[match.end() :] if (match := STAMP.match(line)) else line


class RankOutput:
    """Copies a rank's pipe to its log stream as it comes, and puts the time before each line."""

    def __init__(self, pipe: int, rundir: RunDir, name: str, secrets: Sequence[bytes]) -> None:
        self.pipe = pipe
        os.set_blocking(pipe, False)
        self._file = rundir.stream(name)
        # Longest first: one secret may be the beginning of another.
        self._secrets = sorted(secrets, key=len, reverse=True)
        self._held = b""
        self._tail = b""
        self._begins = True  # whether the next byte is the first of a line
        self.open = True

    def fileno(self) -> int:
        """For selectors."""
        return self.pipe

    def pump(self) -> bool:
        """Copy what has arrived. False when the rank and all that inherited its output are gone."""
        while True:
            try:
                data = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                self.close()
                return False
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._secrets:
            # A secret may be cut by a read: only whole lines are looked at and written.
            data = self._held + data
            end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            if not end and len(data) > MAX_LINE:
                end = len(data)
            data, self._held = data[:end], data[end:]
            for secret in self._secrets:
                data = data.replace(secret, b"[secret]")
        if data:
            self._file.write(self._stamped(data))
            self._tail = (self._tail + data)[-TAIL_BYTES:]

    def _stamped(self, data: bytes) -> bytes:
        """All lines that begin in ``data`` share one time, that of this read: looking at each would cost too much."""
        now = stamp(time.time())
        ends = data.endswith(b"\n")
        body = (data[:-1] if ends else data).replace(b"\n", b"\n" + now)
        begins, self._begins = self._begins, ends
        return (now if begins else b"") + body + (b"\n" if ends else b"")

    def close(self) -> None:
        """Write what was held back and close both ends."""
        if not self.open:
            return
        self.open = False
        held, self._held = self._held, b""
        if held:
            self._write(held + b"\n")
        self._file.close()
        os.close(self.pipe)

    def tail(self, lines: int = 30) -> str:
        """The last lines that the rank wrote, without their times."""
        return "\n".join(self._tail.decode("utf-8", "replace").rstrip("\n").split("\n")[-lines:])
