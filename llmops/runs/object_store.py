"""A run store on whatever fsspec opens, as long as it can create an object exclusively."""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.runs.store import ASIDE_PREFIX, check_path

# Protocols whose `mode="create"` is decided by the server (memory: by the lock below). Elsewhere two jobs could win.
EXCLUSIVE_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "memory")
CREATE_TRIES = 4
_WRITER_KEY = "llmops-writer"
_memory_lock = threading.Lock()


class FsspecStore:
    """Objects under one prefix of an fsspec file system."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")

    @classmethod
    def open(cls, url: str) -> FsspecStore:
        """Does not contact the server. Raises ``UserError`` for a protocol that is unknown, not installed or unfit."""
        from fsspec.core import url_to_fs

        protocol = url.split("://", 1)[0]
        if protocol not in EXCLUSIVE_PROTOCOLS:
            known = ", ".join(f"{name}://" for name in EXCLUSIVE_PROTOCOLS if name != "memory")
            raise UserError(
                f"{url}: runs cannot live on {protocol}://, which has no exclusive create; use a path or {known}"
            )
        try:
            # Another machine writes what this one lists: a cached listing would be a lie.
            filesystem, root = url_to_fs(url, use_listings_cache=False)  # type: ignore[no-untyped-call]
        except ImportError as error:
            raise UserError(f"{url}: {error}") from error
        except ValueError as error:
            raise UserError(f"{url}: not a URL that a run can live at: {error}") from error
        if not root.strip("/") and protocol != "memory":
            raise UserError(f"{url}: the bucket is missing; write {protocol}://bucket/runs")
        return cls(filesystem, root, url)

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    @property
    def url(self) -> str:
        return self._url

    @property
    def job_url(self) -> str:
        return self.url

    @property
    def login(self) -> str | None:
        return None

    @property
    def local_path(self) -> Path | None:
        return None

    def put(self, path: str, data: bytes) -> None:
        with self._errors(path, writing=True):
            self._fs.pipe_file(self._object(path), bytes(data))

    def create(self, path: str, data: bytes, mode: int = 0o644) -> bool:
        """``mode`` means nothing here: access is the bucket's."""
        with self._errors(path, writing=True):
            if "memory" in self._protocols():
                return self._create_in_memory(self._object(path), bytes(data))
            return self._create(self._object(path), bytes(data))

    def get(self, path: str) -> bytes:
        with self._errors(path):
            return bytes(self._fs.cat_file(self._object(path)))

    def read(self, path: str, start: int, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        with self._errors(path):
            try:
                return bytes(self._fs.cat_file(self._object(path), start=start, end=end))
            except OSError as error:
                # Servers answer a range past the end with an error; a reader that follows a log asks for one often.
                if error.errno == errno.EINVAL and self._fs.size(self._object(path)) <= start:
                    return b""
                raise

    def list(self, path: str = "") -> list[str]:
        with self._errors(path):
            folder = self._key(path)
            self._fs.invalidate_cache(folder)
            try:
                found = self._fs.ls(folder, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            prefix = folder.strip("/") + "/" if folder.strip("/") else ""
            children = (str(name).strip("/") for name in found)
            names = {name[len(prefix) :] for name in children if name.startswith(prefix)}
            return sorted(name for name in names if name and not name.startswith(ASIDE_PREFIX))

    def size(self, path: str) -> int:
        with self._errors(path):
            self._fs.invalidate_cache(self._key(path))
            info = self._fs.info(self._object(path))
            if info["type"] == "directory":
                raise FileNotFoundError(errno.ENOENT, f"no object {path!r} in {self.url}")
            return int(info["size"])

    def exists(self, path: str) -> bool:
        with self._errors(path):
            self._fs.invalidate_cache(self._key(path))
            try:
                self._fs.info(self._key(path))
            except FileNotFoundError:
                return False
            return True

    def sub(self, path: str) -> FsspecStore:
        return FsspecStore(self._fs, self._key(path), f"{self._url}/{path}" if path else self._url)

    def ahead(self, folders: Sequence[str]) -> FsspecStore:
        return self

    def _key(self, path: str) -> str:
        return f"{self._root}/{check_path(path)}" if path else self._root

    def _object(self, path: str) -> str:
        if not path:
            raise ValueError("an object needs a name")
        return self._key(path)

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _create_in_memory(self, key: str, data: bytes) -> bool:
        with _memory_lock:
            if self._fs.exists(key):
                return False
            self._fs.pipe_file(key, data)
            return True

    def _create(self, key: str, data: bytes) -> bool:
        """Put with If-None-Match. A put whose answer was lost is sent again by the client and then finds itself."""
        writer = secrets.token_hex(16)
        tagged = "s3" in self._protocols()
        options: dict[str, Any] = {"Metadata": {_WRITER_KEY: writer}} if tagged else {}
        for attempt in range(CREATE_TRIES):
            try:
                self._fs.pipe_file(key, data, mode="create", **options)
                return True
            except OSError as error:
                # A refused condition is FileExistsError or EINVAL; two puts at the same moment may also be EBUSY.
                if not isinstance(error, FileExistsError) and error.errno not in (errno.EINVAL, errno.EBUSY):
                    raise
                self._fs.invalidate_cache(key)
                if self._fs.exists(key):
                    return tagged and self._fs.metadata(key).get(_WRITER_KEY) == writer
                if attempt == CREATE_TRIES - 1:
                    raise
                time.sleep(0.1 * 2**attempt)  # the other put is not visible yet, or was withdrawn
        return False

    @contextlib.contextmanager
    def _errors(self, path: str, writing: bool = False) -> Iterator[None]:
        """One line for every way that a server or its client library fails; they share no base class."""
        try:
            yield
        except (UserError, ClusterError, ValueError):
            raise
        except FileNotFoundError as error:
            if writing:
                raise UserError(f"{self.url}: there is no such bucket ({_one_line(error)}); create it first") from error
            raise
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, f"no object {path!r} in {self.url}") from error
        except PermissionError as error:
            raise UserError(
                f"{self.url}: access denied ({_one_line(error)}); check the credentials of this store"
            ) from error
        except Exception as error:
            if "credential" in type(error).__name__.lower():
                raise UserError(f"{self.url}: no credentials for this store ({_one_line(error)})") from error
            raise ClusterError(f"{self.url}: the store did not answer as it should: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
