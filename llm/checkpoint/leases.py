"""Leases of readers: ``leases/<token>.json`` in the run directory. Nothing that somebody reads is removed.

A lease expires, so that a reader that died holds nothing for ever; a living one renews it from a thread. Whoever
removes a checkpoint compares the time of expiry with its own clock and allows for a difference between the two.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import msgspec

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import is_committed
from llm.utils.storage import Storage
from llm.utils.structs import ready

FOLDER = "leases"
LEASE_S = 600.0
LIMIT_S = 86400.0  # a reader that takes longer has hung
MARGIN_S = 300.0  # by which clocks of two hosts may differ
JOIN_S = 5.0


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a lease's file."""

    commit: str
    expires: float  # epoch seconds of the reader's clock
    by: str = ""  # host and process, for people


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as it was found. ``commit`` is None where the file holds no lease: it protects nothing."""

    path: str
    commit: Commit | None
    expires: float = 0.0
    by: str = ""

    def expired(self, now: float) -> bool:
        """Is it over on every host's clock?"""
        return self.commit is None or now > self.expires + MARGIN_S


@contextlib.contextmanager
def lease(
    storage: Storage, commit: Commit, seconds: float = LEASE_S, limit_s: float = LIMIT_S, by: str = ""
) -> Iterator[None]:
    """Keep ``commit`` from being removed while the block runs, for ``limit_s`` at most.

    Renewed every third of ``seconds``; a renewal that fails is tried again a third later. Raises CheckpointError when
    the commit is gone already, and OSError when the lease cannot be written.
    """
    path = f"{FOLDER}/{secrets.token_hex(8)}.json"
    by = by or f"{socket.gethostname()}:{os.getpid()}"
    until = time.monotonic() + limit_s
    done = threading.Event()

    def record() -> bytes:
        return msgspec.json.encode(LeaseRecord(commit=commit.path, expires=time.time() + seconds, by=by))

    def renew() -> None:
        while time.monotonic() < until and not done.wait(seconds / 3):
            with contextlib.suppress(OSError):  # the lease still stands for two thirds of its time
                storage.replace(path, record())

    storage.create(path, record())
    thread = threading.Thread(target=renew, name=f"lease {path}", daemon=True)
    try:
        # Whoever removes the commit takes its manifest away first and looks for leases then: one sees the other.
        if not is_committed(storage, commit):
            raise CheckpointError(f"{commit.path} is not, or no longer, committed in {storage.url}")
        thread.start()
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join(JOIN_S)  # a renewal that is still on its way leaves a lease that expires by itself
        with contextlib.suppress(OSError):  # likewise
            storage.remove(path)


def read_leases(storage: Storage) -> list[Lease]:
    """All leases, expired ones too."""
    found = []
    for name in storage.list(FOLDER):
        path = f"{FOLDER}/{name}"
        try:
            record = msgspec.json.decode(storage.read(path), type=LeaseRecord)
            found.append(Lease(path=path, commit=Commit.parse(record.commit), expires=record.expires, by=record.by))
        except FileNotFoundError:  # released a moment ago
            continue
        except (msgspec.MsgspecError, UnicodeDecodeError, CheckpointError):
            found.append(Lease(path=path, commit=None))
    return found


def leased(storage: Storage, now: float | None = None) -> set[Commit]:
    """The commits that somebody may be reading."""
    now = time.time() if now is None else now
    return {each.commit for each in read_leases(storage) if each.commit is not None and not each.expired(now)}


ready(LeaseRecord)
