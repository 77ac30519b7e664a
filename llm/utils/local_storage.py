"""A run directory on a POSIX file system. Every write is durable when it returns."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm.utils.storage import Buffer, rest

DIRECT_FROM = 1 << 20  # smaller files gain nothing from bypassing the page cache
CHUNK, THREADS = 8 << 20, 4
PAGE = 4096
AT_ONCE = os.sysconf("SC_IOV_MAX")  # buffers of one system call


class LocalStorage:
    """A directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def path(self, path: str) -> Path:
        """Where a file of this directory lies."""
        return self.root / path

    def within(self, seconds: float) -> LocalStorage:
        return self

    def write(self, path: str, data: Buffer) -> None:
        """Big page-aligned buffers go past the page cache: no second copy in memory, and training keeps its cache."""
        target = self._prepare(path)
        descriptor = _open_new(target, direct=len(data) >= DIRECT_FROM)
        try:
            with _told(target, len(data), descriptor):
                chunks = range(0, len(data), CHUNK)
                if len(chunks) > 1:  # a disk is at its fastest with several requests in its queue
                    with ThreadPoolExecutor(min(THREADS, len(chunks))) as pool:
                        list(pool.map(lambda at: _write(descriptor, memoryview(data)[at : at + CHUNK], at), chunks))
                else:
                    _write(descriptor, memoryview(data), 0)
                os.fsync(descriptor)
        except BaseException:
            target.unlink(missing_ok=True)  # of no use to anyone, and in the way on a full disk
            raise
        finally:
            os.close(descriptor)
        sync_folder(target.parent)

    def create(self, path: str, data: bytes) -> None:
        target = self._prepare(path)
        aside = _write_aside(target, data)
        try:
            os.link(aside, target)
        except FileExistsError:
            if target.read_bytes() != data:
                raise
        finally:
            aside.unlink()
        sync_folder(target.parent)

    def replace(self, path: str, data: bytes) -> None:
        target = self._prepare(path)
        _write_aside(target, data).replace(target)
        sync_folder(target.parent)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        with self.path(path).open("rb", buffering=0) as stream:
            stream.seek(start)
            return stream.read() if end is None else stream.read(end - start)

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> int:
        done, left = 0, rest(buffers, 0)
        descriptor = os.open(f"{self.url}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while left and (count := os.preadv(descriptor, left[:AT_ONCE], start + done)):
                done += count
                left = rest(left, count)
        finally:
            os.close(descriptor)
        return done

    def sizes(self, path: str) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        try:
            with os.scandir(self.path(path)) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with contextlib.suppress(FileNotFoundError):
                            found[entry.name] = None if entry.is_dir() else entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def list(self, path: str) -> list[str]:
        try:
            return sorted(entry.name for entry in self.path(path).iterdir() if entry.name[0] != ".")
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        folder = self.path(path)
        try:
            if only_empty:
                folder.rmdir()
            else:
                shutil.rmtree(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            if not (only_empty and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise

    def _prepare(self, path: str) -> Path:
        target = self.path(path)
        missing = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:  # a new folder is durable only once its own parent is
            sync_folder(folder.parent)
        return target


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_new(target: Path, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct:
        try:
            return os.open(target, flags | os.O_DIRECT, 0o644)
        except OSError as error:  # tmpfs, some network and FUSE file systems
            if error.errno != errno.EINVAL:
                raise
            target.unlink(missing_ok=True)  # the flag may be refused after the file was made
    return os.open(target, flags, 0o644)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    """Write ``data`` at ``at``: past the page cache as long as it is whole pages and the buffer allows it."""
    cached = False  # by this thread: another one may have switched direct I/O off while this one was writing
    while data:
        whole = len(data) // PAGE * PAGE
        if not whole:
            _use_page_cache(descriptor)
        try:
            done = os.pwrite(descriptor, data[: whole or len(data)], at)
        except OSError as error:
            if error.errno != errno.EINVAL or cached:
                raise  # EINVAL: the buffer is not aligned as this device wants it
            _use_page_cache(descriptor)
            cached = True
            continue
        data, at = data[done:], at + done


def _use_page_cache(descriptor: int) -> None:
    """Switch direct I/O off."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _write_aside(target: Path, data: bytes) -> Path:
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with _told(target, len(data), descriptor):
            _write(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return aside


@contextlib.contextmanager
def _told(target: Path, size: int, descriptor: int) -> Iterator[None]:
    """Errors of writing to a descriptor say of which file, and on a full disk how many of its ``size`` bytes fit."""
    try:
        yield
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fit = min(os.fstat(descriptor).st_blocks * 512, size)
            what += f", {size - fit} of {size} bytes do not fit"
        raise OSError(error.errno, what, str(target)) from error
