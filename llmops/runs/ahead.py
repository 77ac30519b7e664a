"""Run directories whose small files were read in one request, where each costs a round trip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmops.runs.store import Store, check_path


@dataclass
class Read:
    """What was read, by path from the store's root: names in folders, sizes of files, and parts of their contents."""

    names: dict[str, list[str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    parts: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)  # where each begins

    def absent(self, path: str) -> bool:
        """Whether it is known that there was nothing."""
        folder, _, name = path.rpartition("/")
        return folder in self.names and name not in self.names[folder]

    def part(self, path: str, start: int, end: int | None) -> bytes | None:
        """Bytes ``start`` to ``end``, as far as the file went; None where they were not read."""
        size = self.sizes.get(path)
        if size is None:
            return None
        stop = size if end is None else min(end, size)
        if stop <= start:
            return b""
        for begin, data in self.parts.get(path, ()):
            if begin <= start and stop <= begin + len(data):
                return data[start - begin : stop - begin]
        return None


class Ahead:
    """A store as it was when ``read`` was read; it is asked for everything else."""

    def __init__(self, store: Store, read: Read, prefix: str = "") -> None:
        self._store, self._read, self._prefix = store, read, prefix

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def job_url(self) -> str:
        return self._store.job_url

    @property
    def login(self) -> str | None:
        return self._store.login

    @property
    def local_path(self) -> Path | None:
        return self._store.local_path

    def put(self, path: str, data: bytes) -> None:
        self._store.put(path, data)

    def create(self, path: str, data: bytes, mode: int = 0o644) -> bool:
        return self._store.create(path, data, mode)

    def get(self, path: str) -> bytes:
        return self.read(path, 0)

    def read(self, path: str, start: int, end: int | None = None) -> bytes:
        found = self._read.part(self._key(path), start, end)
        if found is not None:
            return found
        self._check(path)
        return self._store.read(path, start, end)

    def list(self, path: str = "") -> list[str]:
        key = self._key(path)
        if key in self._read.names:
            return list(self._read.names[key])
        return [] if self._read.absent(key) else self._store.list(path)

    def size(self, path: str) -> int:
        self._check(path)
        found = self._read.sizes.get(self._key(path))
        return self._store.size(path) if found is None else found

    def exists(self, path: str) -> bool:
        return self._store.exists(path)

    def sub(self, path: str) -> Ahead:
        return Ahead(self._store.sub(path), self._read, f"{self._key(path)}/" if path else self._prefix)

    def ahead(self, folders: Sequence[str]) -> Store:
        return self

    def _key(self, path: str) -> str:
        return (self._prefix + check_path(path)).rstrip("/")

    def _check(self, path: str) -> None:
        if self._read.absent(self._key(path)):
            raise FileNotFoundError(f"no object {path!r} in {self.url}")
