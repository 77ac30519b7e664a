"""The run store: does everything work that runs do with it, how long does it take, and whose clock does it have?"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmops.errors import ClusterError, UserError
from llmops.runs.store import Store, open_store
from llmops.sites.checks import Check

T = TypeVar("T")

SECTION = "run store"
SLOW_S = 2.0  # of one small request: a supervisor makes a few of them before the ranks start
CLOCK_WARN_S = 5.0
CLOCK_FAIL_S = 300.0  # munge takes credentials no older than this; S3 requests fail at 900
GIB = 1 << 30
SPACE_FAIL = 1 * GIB
SPACE_WARN = 20 * GIB  # a commit of 1.4 G parameters with the moments of AdamW, in 32 bits
DATA = b"llmops doctor\n"


def check(url: str) -> list[Check]:
    """A round trip at ``url``, in a folder of its own that no reader of runs looks at. Leaves nothing behind."""
    store = open_store(url)
    folder = f".doctor-{secrets.token_hex(6)}"
    took: dict[str, float] = {}
    clock: Check | None = None
    try:
        wrong = _round_trip(store, folder, took)
        clock = _clock(store, f"{folder}/put")
    finally:
        left = _remove(store, folder, took) if "put" in took else ""
    times = ", ".join(f"{name} {_milliseconds(took[name])}" for name in took)
    found = f"{store.url}: {times}"
    checks = []
    if wrong:
        checks.append(Check(SECTION, "round trip", "fail", f"{found}; {wrong[0]}", wrong[1]))
    elif left:
        remedy = "allow deletion there, or `llmops ckpt` can remove nothing"
        checks.append(Check(SECTION, "round trip", "warn", f"{found}; {left}", remedy))
    elif max(took.values()) > SLOW_S:
        remedy = "use a store that is nearer: every attempt makes some of these requests before its ranks start"
        checks.append(Check(SECTION, "round trip", "warn", found, remedy))
    else:
        checks.append(Check(SECTION, "round trip", "ok", found))
    checks += [clock] if clock else []
    checks += [_space(store.local_path)] if store.local_path else []
    return checks


def _round_trip(store: Store, folder: str, took: dict[str, float]) -> tuple[str, str] | None:
    """What is wrong and what to do about it; None when all works."""

    def timed(name: str, work: Callable[[], T]) -> T:
        began = time.monotonic()
        value = work()
        took[name] = time.monotonic() - began
        return value

    timed("put", lambda: store.put(f"{folder}/put", DATA))
    won = timed("create", lambda: store.create(f"{folder}/create", DATA))
    again = timed("create again", lambda: store.create(f"{folder}/create", b"other"))
    listed = timed("list", lambda: store.list(folder))
    read = timed("read", lambda: store.get(f"{folder}/create"))
    if not won or again:
        remedy = "choose another runs_url: here two jobs could run one run at the same time"
        return f"exclusive create does not hold (first: {won}, second: {again})", remedy
    if listed != ["create", "put"] or read != DATA:
        remedy = "choose another runs_url: what was written is not read back at once"
        return f"listed {listed}, read {read[:20]!r}", remedy
    return None


def _remove(store: Store, folder: str, took: dict[str, float]) -> str:
    """Take the folder away. What stayed, in words; empty when nothing did."""
    from llm.utils.storage import open_storage

    began = time.monotonic()
    try:
        open_storage(store.url).remove_folder(folder)
        if store.list(folder):
            return f"{folder} is still there after its removal"
    except (OSError, UserError, ClusterError) as error:
        return f"{folder} stayed: {error}"
    took["delete"] = time.monotonic() - began
    return ""


def _clock(store: Store, path: str) -> Check | None:
    """The time that the store gave to an object, beside ours; None where it gives none."""
    before = time.time()
    store.put(path, DATA)
    after = time.time()
    if store.local_path is not None:
        stamp, coarse = (store.local_path / path).stat().st_mtime, 0.05
    else:
        from fsspec.core import url_to_fs

        filesystem, key = url_to_fs(f"{store.url}/{path}", use_listings_cache=False)  # type: ignore[no-untyped-call]
        try:
            stamp, coarse = filesystem.modified(key).timestamp(), 1.0
        except NotImplementedError:
            return None
    # Whatever moment of the request it was stamped at, and whatever it was rounded to, says nothing of the clock.
    offset = stamp - min(max(stamp, before - coarse), after + coarse)
    return offset_check(SECTION, "the store", offset)


def offset_check(section: str, whose: str, offset: float) -> Check:
    """A check of how far a clock is before ours, in seconds."""
    size = abs(offset)
    found = f"{whose}: {size:.1f} s {'ahead of' if offset > 0 else 'behind'} this machine" if size >= 1 else ""
    found = found or f"{whose} has the same time, to a second"
    if size < CLOCK_WARN_S:
        return Check(section, "clock", "ok", found)
    remedy = "let both keep time by NTP (timedatectl): credentials expire by it, and ages are wrong"
    return Check(section, "clock", "fail" if size > CLOCK_FAIL_S else "warn", found, remedy)


def _space(folder: Path) -> Check:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    inodes = os.statvfs(folder)
    found = f"{free / GIB:,.1f} GiB free (quotas are not seen)"
    if inodes.f_files and inodes.f_favail < 10_000:
        return Check(
            SECTION, "space", "warn", f"{found}, but only {inodes.f_favail} files", "remove what is not needed"
        )
    if free < SPACE_WARN:
        remedy = "remove old commits (`llmops ckpt gc RUN`), or choose a larger file system as runs_url"
        return Check(SECTION, "space", "fail" if free < SPACE_FAIL else "warn", found, remedy)
    return Check(SECTION, "space", "ok", found)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def no_store(backend: str, asked: bool) -> Check:
    """Where none is set, and the backend has no default. ``asked``: this backend is meant, not only found here."""
    found = f"LLMOPS_RUNS_URL is not set, and {backend} has no default that its nodes could reach"
    remedy = "export LLMOPS_RUNS_URL=URL of a folder on a shared file system, or of an object store (s3://bucket/runs)"
    return Check(SECTION, f"set for {backend}", "fail" if asked else "warn", found, remedy)
