"""Files of a run directory, on a local path or any fsspec URL. Free of torch; fsspec is imported only for a URL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

Buffer = bytes | memoryview


class Storage(Protocol):
    """What a training run needs of a run directory. Paths are relative and separated by ``/``. Safe to use in threads.

    Whatever the store cannot do is an OSError whose text says what was tried, and where.
    """

    url: str

    def within(self, seconds: float) -> Storage:
        """The same files, where every request ends within ``seconds`` from now. A file system promises nothing."""

    def write(self, path: str, data: Buffer) -> None:
        """Write a file that nobody reads yet, durably. Raises FileExistsError where the store can tell."""

    def create(self, path: str, data: bytes) -> None:
        """Make a whole file appear in one step, or raise FileExistsError and change nothing.

        That the same bytes are there already is no error: the answer to an earlier try may have been lost.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Make a whole file appear in one step, in place of the one that may be there."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``start`` .. ``end``. Raises FileNotFoundError; a short file gives fewer."""

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill one buffer after the other with the bytes from ``start`` on; returns how many there were.

        Raises FileNotFoundError.
        """

    def sizes(self, path: str) -> dict[str, int | None]:
        """Name of everything in a folder -> bytes, None for a folder; empty when there is no such folder."""

    def list(self, path: str) -> list[str]:
        """Names in a folder, sorted; none when there is no such folder."""

    def remove(self, path: str) -> None:
        """Remove a file; that it is already gone is no error."""

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        """Remove a folder with all that is in it, or only if it has nothing; that it is gone is no error."""


def rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` when the first ``done`` bytes are filled."""
    left = []
    for view in buffers:
        if done < len(view):
            left.append(view[done:] if done else view)
        done = max(done - len(view), 0)
    return left


def open_storage(url: str) -> Storage:
    """The run directory at ``url``: a path, a ``file://`` URL, or any other URL that fsspec knows."""
    from llm.utils.local_storage import LocalStorage

    if "://" not in url:
        return LocalStorage(Path(url).absolute())
    parts = urlsplit(url)
    if parts.scheme in ("file", "local"):
        return LocalStorage(Path(unquote(parts.path)))
    from llm.utils.object_storage import ObjectStorage

    return ObjectStorage(url)
