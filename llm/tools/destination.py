"""Where an export goes: a new file or folder, on a path or any fsspec URL, that appears whole or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import unquote, urlsplit

from llm.checkpoint.format import CheckpointError
from llm.utils.local_storage import sync_folder
from llm.utils.storage import Storage, open_storage

ONE_REQUEST = 5 * 10**9  # bytes; stores refuse more
REMOTE_FILE = 256 << 20  # bytes of a file that is kept in memory until it is sent


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append."""


class Folder(Protocol):
    """A folder that is being filled."""

    def file(self, name: str, last: bool = False) -> contextlib.AbstractContextManager[Sink]:
        """A new file in it. The ``last`` one tells readers that everything is there."""


def local_path(target: str) -> Path | None:
    """The path that ``target`` means, or None for a URL of a store."""
    parts = urlsplit(target)
    if "://" not in target:
        return Path(target).expanduser().absolute()
    return Path(unquote(parts.path)) if parts.scheme in ("file", "local") else None


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[Folder]:
    """A folder at ``target``, which must not exist. Without an error it is there afterwards; else nothing is."""
    path = local_path(target)
    if path is None:
        storage = open_storage(target)
        if storage.sizes(""):
            raise CheckpointError(f"{target} exists: name another target")
        remote = _Remote(storage)
        try:
            yield remote
        except BaseException:
            remote.undo()
            raise
        return
    with _aside(path) as aside:
        aside.mkdir()
        yield _Local(aside)
        sync_folder(aside)
        aside.rename(path)


@contextlib.contextmanager
def new_file(target: str, size: int) -> Iterator[IO[bytes]]:
    """A file of about ``size`` bytes at ``target``, which must not exist; likewise."""
    path = local_path(target)
    if path is None:
        with _sent_file(target, size) as stream:
            yield stream
        return
    with _aside(path) as aside:
        with aside.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _appear(aside, path)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name beside ``path``. Whatever still has it in the end is removed."""
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists: name another target")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield aside
        sync_folder(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _appear(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        raise CheckpointError(f"{path} exists: name another target") from None


class _Local:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def file(self, name: str, last: bool = False) -> Iterator[Sink]:
        with (self.path / name).open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())


class _Remote:
    """Objects are sent when they are complete, ``last`` only if nobody else has sent it."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.sent: list[str] = []

    @contextlib.contextmanager
    def file(self, name: str, last: bool = False) -> Iterator[Sink]:
        data = _Buffer()
        yield data
        if not last:
            self.sent.append(name)
            self.storage.write(name, memoryview(data.data))
            return
        try:
            self.storage.create(name, bytes(data.data))
        except FileExistsError:
            raise CheckpointError(f"{self.storage.url} exists: name another target") from None
        self.sent.append(name)

    def undo(self) -> None:
        """Remove what was sent."""
        with contextlib.suppress(OSError):  # the failure that brought us here is the one to tell
            for name in reversed(self.sent):
                self.storage.remove(name)


class _Buffer:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes | memoryview, /) -> int:
        self.data += data
        return len(data)


@contextlib.contextmanager
def _sent_file(target: str, size: int) -> Iterator[IO[bytes]]:
    """Written to a temporary file first, then sent in one request."""
    folder, _, name = target.rstrip("/").rpartition("/")
    if size >= ONE_REQUEST:
        raise CheckpointError(
            f"{target} would have {size / 1e9:.1f} GB, too much for one object: export to a path, or as dcp or hf"
        )
    storage = open_storage(folder)
    if name in storage.sizes(""):
        raise CheckpointError(f"{target} exists: name another target")
    with tempfile.TemporaryFile() as stream:
        yield stream
        stream.flush()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                storage.create(name, memoryview(data))  # type: ignore[arg-type]
            except FileExistsError:
                raise CheckpointError(f"{target} exists: name another target") from None
