"""The run directory as the supervisor sees it: small JSON objects put once, and streams of output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

PATIENCE_S = 120.0  # for a store that is out of reach for a while


class StoreError(OSError):
    """The run store refused, or did not answer in time. One line."""


class Sink(Protocol):
    """Where output goes."""

    def write(self, data: bytes) -> int:
        """Append."""

    def close(self) -> None:
        """No more will come."""


def is_url(run: str) -> bool:
    """Whether a run is in an object store, not in a folder."""
    return "://" in run


def open_rundir(run: str, python: str | None = None) -> RunDir:
    """The run directory ``run``. ``python``: one that has llmops, by default this one; needed for a URL alone."""
    if not is_url(run):
        return RunDir(run)
    from llmops.agent.remote import RemoteRunDir

    return RemoteRunDir(run, python or sys.executable)


class RunDir:
    """A run directory on a file system that every node of the job reaches."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, name: str) -> str:
        """Absolute path or URL of ``name``."""
        return os.path.join(self.root, name)

    def get(self, name: str, patience_s: float = PATIENCE_S) -> dict[str, Any] | None:
        """The JSON object ``name``, or None when it is absent.

        ``patience_s``: how long a store that is out of reach is asked again; a file system answers in its own time.
        """
        try:
            with open(self.path(name), "rb") as file:
                return self._object(name, file.read())
        except FileNotFoundError:
            return None

    def _object(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{self.path(name)} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self.path(name)} holds {type(value).__name__}, not an object")
        return value

    def create(self, name: str, value: dict[str, Any], patience_s: float = PATIENCE_S) -> bool:
        """Put ``value`` under ``name`` if nothing is there. False when somebody was first.

        Written aside, flushed to the disk and linked into place: a reader sees all of it or nothing, and of two
        writers one wins.
        """
        target = self.path(name)
        folder = os.path.dirname(target)
        os.makedirs(folder, exist_ok=True)
        aside = os.path.join(folder, f".{os.path.basename(name)}.{uuid.uuid4().hex}.tmp")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with open(descriptor, "wb") as file:
                file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, target)
            except FileExistsError:
                return False
        finally:
            os.unlink(aside)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return True

    def list(self, name: str) -> list[str]:
        """Sorted names inside the folder ``name``; empty when it is absent."""
        try:
            return sorted(entry for entry in os.listdir(self.path(name)) if not entry.startswith("."))
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        """Whether the object ``name`` is there."""
        return os.path.exists(self.path(name))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """Path of a file with the content of ``name``, which may also be an absolute path or URL outside of the run."""
        yield self.path(name)

    def stream(self, name: str) -> Sink:
        """The output stream ``name``, from its part 0: what is written is in the store at once, or within seconds."""
        target = self.path(f"{name}.000000.log")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        return open(target, "ab", buffering=0)

    def tend(self) -> None:
        """To be called now and then while streams are open."""

    def close(self) -> None:
        """Store what was written to the streams, within seconds; there is nothing to wait for in a folder."""
