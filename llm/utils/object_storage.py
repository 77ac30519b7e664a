"""A run directory on an object store, through fsspec. Requests are watched, tried again, and given up in time.

Neither fsspec nor the SDKs below it bound a request that makes no progress: s3fs waits for ever for a server that
accepts a connection and never answers. So each request runs under a watchdog here, and this is the only place that
retries: what the libraries would repeat on their own is switched off.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from llm.utils.storage import Buffer

T = TypeVar("T")

CONNECT_S = 5.0
SLOWEST = 64 << 10  # bytes per second; a download reports no progress, so it may take its size by this
STALL_S = 15.0  # a request in which no byte moves for this long is broken off and sent again
PATIENCE_S = 60.0  # a request that keeps failing is given up after this long, unless `within` says otherwise
BACKOFF_S, BACKOFF_MAX_S = 0.1, 5.0

# Answers that another try will not change.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, NotImplementedError)
_memory_lock = threading.Lock()  # fsspec's in-process store looks and puts in two steps


class ObjectStorage:
    """A prefix of an object store. Objects appear whole, so only ``create`` needs the store's help."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = self.url.split("://", 1)[0]
        self.s3 = protocol in ("s3", "s3a")
        options: dict[str, Any] = {"use_listings_cache": False}
        if self.s3:
            given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            timeouts = {"connect_timeout": CONNECT_S, "read_timeout": STALL_S, "max_pool_connections": 64}
            options["config_kwargs"] = {**timeouts, **given, "retries": {"total_max_attempts": 1}}
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)  # type: ignore[no-untyped-call]
        if self.s3:
            self.fs.retries = 1
        self._limit: float | None = None

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """All requests that are made inside, by any thread, end within ``seconds`` from now."""
        self._limit = time.monotonic() + seconds
        try:
            yield
        finally:
            self._limit = None

    def write(self, path: str, data: Buffer) -> None:
        self._put(path, data)

    def create(self, path: str, data: bytes) -> None:
        try:
            if self.fs.protocol == "memory":
                with _memory_lock:
                    self._put(path, data, mode="create")
            else:
                self._put(path, data, mode="create")
        except FileExistsError:
            if self.read(path) != data:
                raise FileExistsError(f"{self.url}/{path} exists") from None

    def replace(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        slow_s = (0 if end is None else end - start) / SLOWEST

        def get(key: str) -> bytes:
            try:
                return bytes(self._call("cat_file", key, start=start, end=end, slow_s=slow_s))
            except OSError as error:  # S3 refuses a range that begins behind the end
                if error.errno == errno.EINVAL and self._call("info", key)["size"] <= start:
                    return b""
                raise

        return self._ask("get", path, get)

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        data = self.read(path, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def sizes(self, path: str) -> dict[str, int | None]:
        entries = self._entries(path)
        return {_name(entry["name"]): None if entry["type"] == "directory" else entry["size"] for entry in entries}

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete", path, lambda key: self._call("rm_file", key))

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        if only_empty and self.s3:  # there are no folders
            return
        with contextlib.suppress(FileNotFoundError):
            if only_empty:
                self.fs.rmdir(self._key(path))
            else:
                self._ask("delete", path, lambda key: self._call("rm", key, recursive=True))

    # --- requests --------------------------------------------------------------------------------------------------

    def _put(self, path: str, data: Buffer, **options: Any) -> None:
        # Sent from where it lies: the SDK would not take a memoryview.
        body: Any = _Body(memoryview(data)) if self.s3 else bytes(data)

        def put(key: str) -> None:
            # One request whatever the size: an upload in parts that is given up would lie in the store for ever.
            if self.s3:
                options["chunksize"] = len(data) + 1
            try:
                self._call("pipe_file", key, body, progress=getattr(body, "moved", None), **options)
            except OSError as error:
                # Some servers' refusal to overwrite comes as a plain OSError. An answer that was lost looks the same.
                if options.get("mode") == "create" and not isinstance(error, FINAL) and self._exists(key):
                    raise FileExistsError(f"{self.url}/{path} exists") from error
                raise

        self._ask("put", path, put)

    def _exists(self, key: str) -> bool:
        try:
            self._call("info", key)
        except FileNotFoundError:
            return False
        return True

    def _ask(self, verb: str, path: str, request: Callable[[str], T]) -> T:
        """Send a request until it is answered, for as long as patience lasts. Raises OSError that says why not."""
        began = time.monotonic()
        until = began + PATIENCE_S if self._limit is None else self._limit
        tries = 0
        while True:
            tries += 1
            try:
                return request(self._key(path))
            except FINAL as error:
                raise type(error)(f"{verb} {self.url}/{path}: {_reason(error)}") from error
            except Exception as error:
                if not _passing(error):
                    raise OSError(f"{verb} {self.url}/{path}: {_reason(error)}") from error
                pause = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (tries - 1)) * random.uniform(0.5, 1.5)  # noqa: S311
                if time.monotonic() + pause >= until:
                    seconds = time.monotonic() - began
                    what = f"{verb} {self.url}/{path} failed for {seconds:.0f} s, {tries} tries"
                    raise OSError(f"{what}; the last: {_reason(error)}") from error
            time.sleep(pause)

    def _call(
        self,
        method: str,
        *arguments: Any,
        progress: Callable[[], int] | None = None,
        slow_s: float = 0.0,
        **options: Any,
    ) -> Any:
        """One request. Asynchronous file systems run it under the watchdog."""
        if not getattr(self.fs, "async_impl", False):
            return getattr(self.fs, method)(*arguments, **options)
        request = getattr(self.fs, f"_{method}")(*arguments, **options)
        watched = _watch(request, progress, STALL_S + slow_s, self._limit)
        return asyncio.run_coroutine_threadsafe(watched, self.fs.loop).result()

    def _key(self, path: str) -> str:
        return f"{self.root}/{path}" if path else str(self.root)

    def _entries(self, path: str) -> list[dict[str, Any]]:
        def entries(key: str) -> list[dict[str, Any]]:
            self.fs.invalidate_cache()  # some file systems cache although they were told not to
            return [entry for entry in self._call("ls", key, detail=True) if _name(entry["name"]) != _name(key)]

        try:
            return self._ask("list", path, entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    # The last, since its name hides the type from annotations.
    def list(self, path: str) -> list[str]:
        return sorted({_name(entry["name"]) for entry in self._entries(path)})


async def _watch(request: Awaitable[T], progress: Callable[[], int] | None, stall_s: float, limit: float | None) -> T:
    """Await ``request``; break it off when ``progress`` stands still for ``stall_s``, or at the time ``limit``."""
    task = asyncio.ensure_future(request)
    moved = -1
    try:
        while True:
            patience = stall_s if limit is None else min(stall_s, max(limit - time.monotonic(), 0.1))
            done, _ = await asyncio.wait({task}, timeout=patience)
            if done:
                return task.result()
            now = progress() if progress is not None else moved
            if now == moved or (limit is not None and time.monotonic() >= limit):
                raise TimeoutError(f"no answer within {patience:.0f} s")
            moved = now
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class _Body(io.RawIOBase):
    """A memoryview as a file that SDKs read and rewind. ``moved`` tells how far the last reader is."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def __len__(self) -> int:
        return len(self._data)

    def moved(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._data) - self._position)
        view[:count] = self._data[self._position : self._position + count]
        self._position += count
        return count


def _passing(error: Exception) -> bool:
    """May the same request succeed later? Missing credentials and buckets, or a malformed request, will not."""
    hopeless = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
    return type(error).__name__ not in hopeless and not isinstance(error, TypeError | AttributeError | KeyError)


def _reason(error: BaseException) -> str:
    """One line of an SDK's error."""
    return " ".join(str(error).split()) or type(error).__name__


def _name(key: str) -> str:
    return key.rstrip("/").rsplit("/", 1)[-1]
