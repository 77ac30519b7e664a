"""Where runs live: a directory or an object store, behind six verbs.

An object appears whole or not at all, and ``create`` has one winner. Nothing else in llmops coordinates processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from llmops.errors import ClusterError, UserError

# A file being written lies beside its final name, under a name that starts with this. Readers skip dot files.
ASIDE_PREFIX = "."


class Store(Protocol):
    """A tree of objects under one URL. Paths are relative, separated by ``/``; ``""`` is the root.

    Raises ``ClusterError`` when the store does not answer and ``UserError`` when it refuses.
    """

    @property
    def url(self) -> str:
        """Absolute path or URL, as another machine would open it."""

    @property
    def job_url(self) -> str:
        """Absolute path or URL, as the jobs open it."""

    @property
    def login(self) -> str | None:
        """The host that the store is reached through, as ``cluster.host`` names it; None for this machine."""

    @property
    def local_path(self) -> Path | None:
        """The directory, where the store is one of this machine."""

    def put(self, path: str, data: bytes) -> None:
        """Write an object, or replace it, in one step."""

    def create(self, path: str, data: bytes, mode: int = 0o644) -> bool:
        """Write an object that must not exist yet. False, and nothing changes, when it does."""

    def get(self, path: str) -> bytes:
        """The whole object. Raises ``FileNotFoundError`` when there is none."""

    def read(self, path: str, start: int, end: int | None = None) -> bytes:
        """Bytes ``start`` up to ``end``; fewer where the object is shorter. Raises ``FileNotFoundError``."""

    def list(self, path: str = "") -> list[str]:
        """Sorted names directly below ``path``; empty when there is nothing. Never from a cache."""

    def size(self, path: str) -> int:
        """Length in bytes. Raises ``FileNotFoundError`` when there is no such object."""

    def exists(self, path: str) -> bool:
        """Is there an object, or are there objects below it?"""

    def sub(self, path: str) -> Store:
        """The same store, rooted at ``path``."""

    def ahead(self, folders: Sequence[str]) -> Store:
        """The same store, as it is now, with the small files of these run directories read at once if that helps."""


def open_store(url: str | Path) -> Store:
    """A store for a path (``~`` and relative ones are resolved), a ``file://`` URL, or any URL that fsspec knows."""
    text = str(url)
    if not text:
        raise UserError("the URL of a run store is empty; give a directory or a URL such as s3://bucket/runs")
    if "://" not in text:
        try:
            return PosixStore(Path(text).expanduser().absolute())
        except RuntimeError as error:
            raise UserError(f"{text}: there is no home directory of that name; write the path out") from error
        except FileNotFoundError as error:
            raise UserError(f"{text}: the current folder no longer exists; give an absolute path") from error
    parts = urlsplit(text)
    if parts.scheme in ("file", "local"):
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{text}: a file URL has three slashes, as in file:///{parts.netloc}{parts.path}")
        return PosixStore(Path(unquote(parts.path) or "/"))
    if parts.scheme == "ssh":
        from llmops.runs.ssh_store import SshStore

        return SshStore.open(text)
    from llmops.runs.object_store import FsspecStore

    return FsspecStore.open(text)


def default_runs_url() -> str:
    """``$LLMOPS_RUNS_URL``, else ``llmops/runs`` in the user's data directory."""
    configured = os.environ.get("LLMOPS_RUNS_URL")
    if configured:
        return configured
    import platformdirs

    return str(Path(platformdirs.user_data_dir("llmops", appauthor=False)) / "runs")


def check_path(path: str) -> str:
    """The path itself, when it stays inside the store. Raises ``ValueError``: callers build paths, users do not."""
    if path == "":
        return path
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"not a path inside a store: {path!r}")
    return path


class PosixStore:
    """A directory, local or shared (NFS, Lustre, GPFS)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __repr__(self) -> str:
        return f"PosixStore({self.url!r})"

    @property
    def url(self) -> str:
        return str(self._root)

    @property
    def job_url(self) -> str:
        return self.url

    @property
    def login(self) -> str | None:
        return None

    @property
    def local_path(self) -> Path | None:
        return self._root

    def put(self, path: str, data: bytes) -> None:
        with self._errors(path, writing=True):
            target = self._target(path)
            aside = _write_aside(target, data, 0o644)
            try:
                aside.replace(target)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            _fsync_directory(target.parent)

    def create(self, path: str, data: bytes, mode: int = 0o644) -> bool:
        with self._errors(path, writing=True):
            target = self._target(path)
            if target.exists():
                return False
            aside = _write_aside(target, data, mode)
            try:
                won = _link(aside, target)
            finally:
                aside.unlink(missing_ok=True)
            _fsync_directory(target.parent)
            return won

    def get(self, path: str) -> bytes:
        with self._errors(path):
            return self._path(path).read_bytes()

    def read(self, path: str, start: int, end: int | None = None) -> bytes:
        with self._errors(path), self._path(path).open("rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(max(0, end - start))

    def list(self, path: str = "") -> list[str]:
        with self._errors(path):
            try:
                names = os.listdir(self._path(path))  # noqa: PTH208 - names alone
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(name for name in names if not name.startswith(ASIDE_PREFIX))

    def size(self, path: str) -> int:
        with self._errors(path):
            target = self._path(path)
            status = target.stat()
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            return status.st_size

    def exists(self, path: str) -> bool:
        with self._errors(path):
            return self._path(path).exists()

    def sub(self, path: str) -> PosixStore:
        return PosixStore(self._path(path))

    def ahead(self, folders: Sequence[str]) -> PosixStore:
        return self

    def _path(self, path: str) -> Path:
        return self._root / check_path(path)

    def _target(self, path: str) -> Path:
        if not path:
            raise ValueError("an object needs a name")
        target = self._path(path)
        _make_directory(target.parent)
        return target

    @contextlib.contextmanager
    def _errors(self, path: str, writing: bool = False) -> Iterator[None]:
        """Say in one line what the operating system refused. What is not there to read is a ``FileNotFoundError``."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            if writing:
                where = error.filename or path
                raise UserError(
                    f"{self.url}: runs cannot be kept there ({where}: {error.strerror}); choose another runs_url"
                ) from error
            raise FileNotFoundError(errno.ENOENT, f"no object {path!r} in {self.url}") from error
        except PermissionError as error:
            where = error.filename or path
            raise UserError(
                f"{self.url}: permission denied for {where}; fix its mode, or choose another runs_url"
            ) from error
        except OSError as error:
            kind = UserError if error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP) else ClusterError
            raise kind(f"{self.url}: {error.strerror or error} ({error.filename or path})") from error


def _write_aside(target: Path, data: bytes, mode: int) -> Path:
    """A durable file beside the target, with its content, under a name of its own."""
    aside = target.with_name(f"{ASIDE_PREFIX}{target.name[:200]}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - from a descriptor
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _link(aside: Path, target: Path) -> bool:
    """Give the file its name; False when that is taken."""
    try:
        os.link(aside, target)
    except FileExistsError:
        # NFS sends a request again when the reply was lost, and then reports our own link as somebody else's.
        return aside.stat().st_nlink == 2
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(
                f"{target.parent}: this file system has no hard links, which runs need to be claimed by one job only; "
                "choose a runs_url on another file system or in an object store"
            ) from error
        raise
    return True


def _make_directory(path: Path) -> None:
    """``mkdir -p`` whose result survives a crash of the machine."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _fsync_directory(path.parent)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to flush for a directory
            raise
    finally:
        os.close(descriptor)
