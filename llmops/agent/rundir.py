"""The run directory as the supervisor sees it: small JSON objects put once, and streams of output."""

from __future__ import annotations

import json
import os
import uuid
from typing import Any, BinaryIO


class RunDir:
    """A run directory on a file system that every node of the job reaches."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, name: str) -> str:
        """Absolute path of ``name``."""
        return os.path.join(self.root, name)

    def get(self, name: str) -> dict[str, Any] | None:
        """The JSON object ``name``, or None when it is absent."""
        try:
            with open(self.path(name), "rb") as file:
                value = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{self.path(name)} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self.path(name)} holds {type(value).__name__}, not an object")
        return value

    def create(self, name: str, value: dict[str, Any]) -> bool:
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

    def stream(self, name: str) -> BinaryIO:
        """An unbuffered stream that appends to part 0 of the output stream ``name``."""
        target = self.path(f"{name}.000000.log")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        return open(target, "ab", buffering=0)
