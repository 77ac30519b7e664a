"""Output of one rank: kept in the run directory, its last lines remembered, secrets blotted out."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmops.agent.rundir import RunDir

TAIL_BYTES = 8192
MAX_LINE = 1 << 16


class RankOutput:
    """Copies a rank's pipe to its log stream as it comes."""

    def __init__(self, pipe: int, rundir: RunDir, name: str, secrets: Sequence[bytes]) -> None:
        self.pipe = pipe
        os.set_blocking(pipe, False)
        self._file = rundir.stream(name)
        # Longest first: one secret may be the beginning of another.
        self._secrets = sorted(secrets, key=len, reverse=True)
        self._held = b""
        self._tail = b""
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
            self._file.write(data)
            self._tail = (self._tail + data)[-TAIL_BYTES:]

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
        """The last lines that the rank wrote."""
        return "\n".join(self._tail.decode("utf-8", "replace").rstrip("\n").split("\n")[-lines:])
