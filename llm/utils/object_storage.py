"""A run directory on an object store, through fsspec. Requests are watched, tried again, and given up in time.

Neither fsspec nor the SDKs below it bound a request that makes no progress: s3fs waits for ever for a server that
accepts a connection and never answers. So each request runs under a watchdog here, and this is the only place that
retries: what the libraries would repeat on their own is switched off.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import io
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from llm.utils.s3_download import Downloads
from llm.utils.storage import Buffer, rest

T = TypeVar("T")
S = TypeVar("S", bound="_Collected | _Filled")

CONNECT_S = 5.0
STALL_S = 15.0  # a request in which no byte moves for this long is broken off and sent again
TRIES = 3  # that must fit into the time that is left, however short it is
SLOWEST = 64 << 10  # bytes per second of one connection
UNSEEN = 4 << 20  # bytes that the kernel has taken and may still have to send: nobody sees these move
LISTING_S = 300.0  # a listing of many thousand keys is many requests, of which nothing is seen
PATIENCE_S = 60.0  # a request that keeps failing is given up after this long, unless `within` says otherwise
BACKOFF_S, BACKOFF_MAX_S = 0.1, 5.0
LEAVE_S = 1.0  # for a request that was broken off to take itself apart
CHUNK = 1 << 20  # bytes of a download that are taken at a time

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
            # Who waits for an answer is watched here; the SDK's time-out knows nothing of what is still to be sent.
            waits = STALL_S + UNSEEN / SLOWEST
            timeouts = {"connect_timeout": CONNECT_S, "read_timeout": waits, "max_pool_connections": 64}
            signature = {} if ":" in self.url.split("://", 1)[1] else {"signature_version": "s3v4"}  # also in URLs
            options["config_kwargs"] = {**timeouts, **signature, **given, "retries": {"total_max_attempts": 1}}
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)  # type: ignore[no-untyped-call]
        if self.s3:
            self.fs.retries = 1
        self._straight = Downloads(self.fs) if self.s3 else None
        self._limit: float | None = None

    def within(self, seconds: float) -> ObjectStorage:
        bounded = copy.copy(self)
        bounded._limit = time.monotonic() + seconds
        return bounded

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
        return bytes(self._ask("get", path, lambda key, stall_s: self._get(key, start, end, _Collected(), stall_s)))

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> int:
        if not any(map(len, buffers)):
            return 0
        return self._ask("get", path, lambda key, stall_s: self._fill(key, start, buffers, stall_s))

    def sizes(self, path: str) -> dict[str, int | None]:
        entries = self._entries(path)
        return {_name(entry["name"]): None if entry["type"] == "directory" else entry["size"] for entry in entries}

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete", path, lambda key, stall_s: self._call("rm_file", key, stall_s=stall_s))

    def remove_folder(self, path: str, only_empty: bool = False) -> None:
        if only_empty and self.s3:  # there are no folders
            return
        with contextlib.suppress(FileNotFoundError):
            if only_empty:
                self.fs.rmdir(self._key(path))
            else:
                self._ask("delete", path, lambda key, stall_s: self._call("rm", key, recursive=True, stall_s=stall_s))

    def glob(self, pattern: str) -> dict[str, dict[str, Any]]:
        """What fsspec knows of each key that matches; empty when none does."""
        found: dict[str, dict[str, Any]] = self._ask(
            "list", pattern, lambda key, _: self._call("glob", key, detail=True, stall_s=LISTING_S)
        )
        return found

    # --- requests --------------------------------------------------------------------------------------------------

    def _get(self, key: str, start: int, end: int | None, taken: S, stall_s: float) -> S:
        """Bytes ``start`` .. ``end``."""
        try:
            if self.s3:
                self._run(self._download(key, start, end, taken), stall_s, taken)
            else:  # these tell nothing before they are done
                slow_s = (UNSEEN if end is None else end - start) / SLOWEST
                taken.add(self._call("cat_file", key, start=start, end=end, stall_s=stall_s + slow_s))
        except OSError as error:  # S3 refuses a range that begins behind the end
            if error.errno != errno.EINVAL or self._call("info", key, stall_s=stall_s)["size"] > start:
                raise
        return taken

    def _fill(self, key: str, start: int, buffers: Sequence[memoryview], stall_s: float) -> int:
        """Bytes from ``start`` on, straight from the socket where that is possible."""
        straight = self._straight
        if straight is not None and straight.usable:
            url = straight.signed(key) or self._run(straight.sign(key), stall_s, None)
            if straight.usable and (count := straight.fetch(url, start, buffers, stall_s, self._limit)) is not None:
                return count
        return len(self._get(key, start, start + sum(map(len, buffers)), _Filled(buffers), stall_s))

    async def _download(self, key: str, start: int, end: int | None, target: _Collected | _Filled) -> None:
        bucket, name, _ = self.fs.split_path(key)
        span = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=name, **span)
        async with answer["Body"] as body:
            while chunk := await body.read(CHUNK):
                target.add(chunk)

    def _put(self, path: str, data: Buffer, **options: Any) -> None:
        if self.s3:  # one request whatever the size: an upload in parts that is given up would lie there for ever
            options["chunksize"] = len(data) + 1

        def put(key: str, stall_s: float) -> None:
            # Sent from where it lies, since the SDK would not take a memoryview; from its start at every try.
            body = _Body(memoryview(data)) if self.s3 else None
            try:
                self._call("pipe_file", key, body or bytes(data), stall_s=stall_s, transfer=body, **options)
            except OSError as error:
                # Some servers' refusal to overwrite comes as a plain OSError. An answer that was lost looks the same.
                if options.get("mode") == "create" and not isinstance(error, FINAL) and self._exists(key, stall_s):
                    raise FileExistsError(f"{self.url}/{path} exists") from error
                raise
            finally:
                if body is not None:
                    body.revoke()

        self._ask("put", path, put)

    def _exists(self, key: str, stall_s: float) -> bool:
        try:
            self._call("info", key, stall_s=stall_s)
        except FileNotFoundError:
            return False
        return True

    def _ask(self, verb: str, path: str, request: Callable[[str, float], T]) -> T:
        """Send a request until it is answered, for as long as patience lasts. Raises OSError that says why not.

        ``request`` is called with the key and the seconds for which it may stand still.
        """
        began = time.monotonic()
        until = began + PATIENCE_S if self._limit is None else self._limit
        tries = 0
        if until <= began:
            raise OSError(errno.ETIMEDOUT, f"{verb} {self.url}/{path}: there is no time left for it")
        while True:
            stall_s = min(STALL_S, (until - time.monotonic()) / max(TRIES - tries, 1))
            tries += 1
            try:
                return request(self._key(path), stall_s)
            except FINAL as error:
                if _code(error) == "NoSuchBucket":  # says nothing about what was in it
                    raise OSError(f"{verb} {self.url}/{path}: {_reason(error)}") from error
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
        self, method: str, *arguments: Any, stall_s: float, transfer: _Transfer | None = None, **options: Any
    ) -> Any:
        """One request. Asynchronous file systems run it under the watchdog."""
        if not getattr(self.fs, "async_impl", False):
            return getattr(self.fs, method)(*arguments, **options)
        return self._run(getattr(self.fs, f"_{method}")(*arguments, **options), stall_s, transfer)

    def _run(self, request: Awaitable[T], stall_s: float, transfer: _Transfer | None) -> T:
        watched = _watch(request, transfer, stall_s, self._limit)
        return asyncio.run_coroutine_threadsafe(watched, self.fs.loop).result()

    def _key(self, path: str) -> str:
        return f"{self.root}/{path}" if path else str(self.root)

    def _entries(self, path: str) -> list[dict[str, Any]]:
        def entries(key: str, stall_s: float) -> list[dict[str, Any]]:
            self.fs.invalidate_cache()  # some file systems cache although they were told not to
            found = self._call("ls", key, detail=True, stall_s=stall_s)
            return [entry for entry in found if _name(entry["name"]) != _name(key)]

        try:
            return self._ask("list", path, entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    # The last, since its name hides the type from annotations.
    def list(self, path: str) -> list[str]:
        return sorted({_name(entry["name"]) for entry in self._entries(path)})


class _Transfer(Protocol):
    """What a watchdog wants to know of a request's data."""

    def moved(self) -> int:
        """Bytes that have been sent, or received."""

    def unseen_s(self) -> float:
        """Seconds that bytes which the kernel has already taken may need."""


async def _watch(request: Awaitable[T], transfer: _Transfer | None, stall_s: float, limit: float | None) -> T:
    """Await ``request``; break it off when ``transfer`` stands still for ``stall_s``, or at the time ``limit``."""
    task = asyncio.ensure_future(request)
    began = time.monotonic()
    moved = 0
    try:
        while True:
            now = time.monotonic()
            unseen_s = transfer.unseen_s() if transfer is not None else 0.0
            if limit is not None:  # so much less that there is time for another try
                unseen_s = max(min(unseen_s, limit - began - 2 * stall_s), 0.0)
            until = began + stall_s + unseen_s
            until = until if limit is None else min(until, limit)
            done, _ = await asyncio.wait({task}, timeout=max(min(until - now, stall_s / 4), 0.01))
            if done:
                return task.result()
            if transfer is not None and transfer.moved() != moved:
                moved, began = transfer.moved(), time.monotonic()
            elif time.monotonic() >= until:
                raise TimeoutError(f"no answer within {time.monotonic() - began:.0f} s")
            if limit is not None and time.monotonic() >= limit:
                raise TimeoutError("it was not done in time")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=LEAVE_S)
            if task.done() and not task.cancelled():
                task.exception()  # seen, and of no more interest


class _Body(io.RawIOBase):
    """A memoryview as a file that SDKs read and rewind."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._size, self._position = data, len(data), 0

    def __len__(self) -> int:
        return self._size

    def moved(self) -> int:
        return self._position

    def unseen_s(self) -> float:
        return min(self._size, UNSEEN) / SLOWEST if self._position == self._size else 0.0

    def revoke(self) -> None:
        """Whoever still reads gets nothing more: the memory will soon hold something else."""
        self._data = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view, data = memoryview(buffer).cast("B"), self._data
        count = max(min(len(view), len(data) - self._position), 0)
        view[:count] = data[self._position : self._position + count]
        self._position += count
        return count


class _Collected:
    """A download of any size."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self._chunks)

    def moved(self) -> int:
        return self._size

    def unseen_s(self) -> float:
        return 0.0

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)


class _Filled:
    """A download into memory that is there already."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left, self._size = rest(buffers, 0), 0

    def __len__(self) -> int:
        return self._size

    def moved(self) -> int:
        return self._size

    def unseen_s(self) -> float:
        return 0.0

    def add(self, chunk: bytes) -> None:
        data = memoryview(chunk)
        self._size += len(data)
        while data:  # an IndexError if the store gives more than it was asked for
            count = min(len(self._left[0]), len(data))
            self._left[0][:count] = data[:count]
            self._left, data = rest(self._left, count), data[count:]


def _passing(error: Exception) -> bool:
    """May the same request succeed later? Missing credentials and buckets, or a malformed request, will not."""
    hopeless = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
    return type(error).__name__ not in hopeless and not isinstance(error, TypeError | AttributeError | KeyError)


def _code(error: Exception) -> str:
    """What S3 calls the error; empty if it does not come from there."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _reason(error: BaseException) -> str:
    """One line of an SDK's error."""
    return " ".join(str(error).split()) or type(error).__name__


def _name(key: str) -> str:
    return key.rstrip("/").rsplit("/", 1)[-1]
