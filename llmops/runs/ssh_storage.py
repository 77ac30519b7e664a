"""A run's checkpoints on another host, as :mod:`llm.checkpoint` reads them: to look at, verify, name and remove."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm.utils.storage import Buffer, Storage
from llm.utils.storage import open_storage as open_here
from llmops.runs.ssh_store import SshStore
from llmops.runs.store import Store, check_path


def open_storage(store: Store) -> Storage:
    """The files of a run directory."""
    return SshStorage(store) if isinstance(store, SshStore) else open_here(store.url)


class SshStorage:
    """A folder of a host. What goes wrong is an OSError, or the ``UserError`` or ``ClusterError`` of the connection."""

    def __init__(self, store: SshStore) -> None:
        self._store = store
        self.url = store.url

    def within(self, seconds: float) -> SshStorage:
        """Every request has a limit of its own."""
        return self

    def write(self, path: str, data: Buffer) -> None:
        self.create(path, bytes(data))

    def create(self, path: str, data: bytes) -> None:
        if not self._store.create(path, data) and self._store.get(path) != data:
            raise FileExistsError(f"{self.url}/{path} exists")

    def replace(self, path: str, data: bytes) -> None:
        self._store.put(path, data)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        return self._store.read(path, start, end)

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> int:
        data = memoryview(self._store.read(path, start, start + sum(map(len, buffers))))
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def sizes(self, path: str) -> dict[str, int | None]:
        found: dict[str, int | None] = self._ask("sizes", path)
        return found

    def list(self, path: str) -> list[str]:
        return self._store.list(path)

    def remove(self, path: str) -> None:
        self._ask("remove", path)

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        self._ask("remove_folder", path, only_empty=only_empty)

    def _ask(self, op: str, path: str, **fields: Any) -> Any:
        return self._store.host.ask(op, root=self._store.job_url, path=check_path(path), **fields)[0]
