"""Files of a run directory, on a local path or any fsspec URL. Free of torch; fsspec is imported only for a URL."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

Buffer = bytes | memoryview


class Storage(Protocol):
    """What the trainer needs of a run directory. Paths are relative and separated by ``/``."""

    url: str

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        """Write a new file durably. Raises FileExistsError rather than replace one."""

    def create(self, path: str, data: bytes) -> None:
        """Make a whole file appear in one step, or raise FileExistsError and change nothing."""

    def replace(self, path: str, data: bytes) -> None:
        """Make a whole file appear in one step, in place of the one that may be there."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``start`` .. ``end``. Raises FileNotFoundError; a short file gives fewer."""

    def list(self, path: str) -> list[str]:
        """Names in a folder, sorted; none when there is no such folder."""

    def remove(self, path: str) -> None:
        """Remove a file; that it is already gone is no error."""

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        """Remove a folder and the files in it, or only if it has none; that it is already gone is no error."""


def open_storage(url: str) -> Storage:
    """The run directory at ``url``: a path, a ``file://`` URL, or any other URL that fsspec knows."""
    if "://" not in url:
        return LocalStorage(Path(url).absolute())
    parts = urlsplit(url)
    if parts.scheme in ("file", "local"):
        return LocalStorage(Path(unquote(parts.path)))
    return ObjectStorage(url)


class LocalStorage:
    """A directory on a POSIX file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def path(self, path: str) -> Path:
        """Where a file of this directory lies."""
        return self.root / path

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        target = self._prepare(path)
        with target.open("xb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(target.parent)

    def create(self, path: str, data: bytes) -> None:
        target = self._prepare(path)
        aside = _write_aside(target, data)
        try:
            os.link(aside, target)
        finally:
            aside.unlink()
        _sync_folder(target.parent)

    def replace(self, path: str, data: bytes) -> None:
        target = self._prepare(path)
        _write_aside(target, data).replace(target)
        _sync_folder(target.parent)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        with self.path(path).open("rb") as stream:
            stream.seek(start)
            return stream.read() if end is None else stream.read(end - start)

    def list(self, path: str) -> list[str]:
        try:
            return sorted(entry.name for entry in self.path(path).iterdir() if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        folder = self.path(path)
        with contextlib.suppress(FileNotFoundError):
            children = list(folder.iterdir())
            if children and only_empty:
                return
            for child in children:
                child.unlink(missing_ok=True)
            folder.rmdir()

    def _prepare(self, path: str) -> Path:
        target = self.path(path)
        missing = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:  # a new folder is durable only once its own parent is
            _sync_folder(folder.parent)
        return target


class ObjectStorage:
    """A prefix of an object store. Objects appear whole, so only ``create`` needs the store's help."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(self.url)  # type: ignore[no-untyped-call]

    def write(self, path: str, pieces: Iterable[Buffer]) -> None:
        with self.fs.open(self._key(path), "wb") as stream:
            for piece in pieces:
                stream.write(piece)

    def create(self, path: str, data: bytes) -> None:
        key = self._key(path)
        try:
            self.fs.pipe_file(key, data, mode="create")
        except (TypeError, NotImplementedError):  # this file system has no conditional put
            if self.fs.exists(key):
                raise FileExistsError(f"{self.url}/{path}") from None
            self.fs.pipe_file(key, data)
        except OSError as error:
            # Some S3 servers' refusal comes as a plain OSError, and a put whose answer was lost may have succeeded.
            self.fs.invalidate_cache()
            if not self.fs.exists(key):
                raise
            if self.fs.cat_file(key) != data:
                raise FileExistsError(f"{self.url}/{path}") from error

    def replace(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(self._key(path), data)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        return bytes(self.fs.cat_file(self._key(path), start=start, end=end))

    def list(self, path: str) -> list[str]:
        self.fs.invalidate_cache()  # s3fs would hide what others wrote since
        try:
            entries = self.fs.ls(self._key(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries})

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._key(path))

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        if only_empty:  # an object store has no empty folders
            return
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self._key(path), recursive=True)

    def _key(self, path: str) -> str:
        return f"{self.root}/{path}" if path else str(self.root)


def _write_aside(target: Path, data: bytes) -> Path:
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with aside.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return aside


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
