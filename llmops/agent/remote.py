"""The run directory behind a URL: everything goes through the helper process; output streams by way of a spool."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from llmops.agent.helper import RESTARTS, Helper
from llmops.agent.rundir import PATIENCE_S, RunDir, Sink

FLUSH_S = 10.0  # for the last output of the ranks; llmops.runs.remote gives up a little sooner
FETCH_S = 300.0  # for one file, such as the code, however slow the way to the store
FILE_BYTES = 1 << 20
MAX_FILES = 64  # of a stream that cannot be stored; what comes then is lost


class RemoteRunDir(RunDir):
    """A run directory in an object store."""

    def __init__(self, root: str, python: str) -> None:
        super().__init__(root.rstrip("/"))
        self.helper = Helper([python], self.root)
        self._spool: str | None = None
        self._streams: list[str] = []

    def path(self, name: str) -> str:
        return name if "://" in name else f"{self.root}/{name}"

    def get(self, name: str, patience_s: float = PATIENCE_S) -> dict[str, Any] | None:
        data = self.helper.call("get", patience_s, name=name)
        return None if data is None else self._object(name, base64.b64decode(data))

    def create(self, name: str, value: dict[str, Any], patience_s: float = PATIENCE_S) -> bool:
        data = base64.b64encode(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n").decode()
        # After a lost answer the object found may be our own.
        return bool(self.helper.call("create", patience_s, name=name, data=data)) or self.get(name, patience_s) == value

    def list(self, name: str) -> list[str]:
        return list(self.helper.call("list", name=name))

    def exists(self, name: str) -> bool:
        return bool(self.helper.call("exists", name=name))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        descriptor, path = tempfile.mkstemp(prefix="llmops-")
        os.close(descriptor)
        try:
            self.helper.call("fetch", 2 * FETCH_S, FETCH_S, url=self.path(name), to=path)
            yield path
        finally:
            os.unlink(path)

    def stream(self, name: str) -> Sink:
        if self._spool is None:
            self._spool = tempfile.mkdtemp(prefix="llmops-spool-")
            self.helper.tell("spool", folder=self._spool)
        sink = Spool(os.path.join(self._spool, str(len(self._streams))))
        self._streams.append(name)
        self.helper.tell("stream", name=name, folder=sink.folder)
        return sink

    def tend(self) -> None:
        if self.helper.alive() or self.helper.starts > RESTARTS:
            return
        print("llmops: the helper that stores the output has died; starting another", file=sys.stderr, flush=True)
        if self._spool is not None:
            self.helper.tell("spool", folder=self._spool)
        for number, name in enumerate(self._streams):
            self.helper.tell("stream", name=name, folder=os.path.join(str(self._spool), str(number)))

    def close(self) -> None:
        self.helper.close(FLUSH_S)
        if self._spool is not None:
            shutil.rmtree(self._spool, ignore_errors=True)


class Spool:
    """Output on this node's disk, in files that the helper takes away as it stores them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        os.mkdir(folder)
        self._number = self._size = self._lost = 0
        self._file = self._open()

    def _open(self) -> Any:
        return open(os.path.join(self.folder, f"{self._number:06d}"), "ab", buffering=0)

    def write(self, data: bytes) -> int:
        """Append; never raises, and drops what a full disk or an unreachable store has no room for."""
        try:
            if self._size > FILE_BYTES and len(os.listdir(self.folder)) < MAX_FILES:
                self._file.close()
                self._number, self._size = self._number + 1, 0
                self._file = self._open()
            if self._size <= FILE_BYTES:
                if self._lost:
                    self._file.write(b"\n[llmops: %d bytes of output are lost]\n" % self._lost)
                    self._lost = 0
                self._size += self._file.write(data)
                return len(data)
        except OSError as error:
            print(f"llmops: output cannot be kept in {self.folder}: {error}", file=sys.stderr, flush=True)
        self._lost += len(data)
        return len(data)

    def close(self) -> None:
        """No more will come."""
        self._file.close()
