"""What was known of runs that are over, kept on this machine: nobody reads ten thousand directories twice.

A run that is over changes in one way: somebody resumes it, and that leaves a mark beside all runs (see
``records.marks``). An entry that has another number of marks than the run counts for nothing. A lost file costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from llm.utils.structs import ready
from llmops import __version__
from llmops.config.cache import folder
from llmops.monitor.describe import Described
from llmops.monitor.timeline import Span

FORMAT = 1
SETTLE_S = 600.0  # where no record says that a run is over, only its scheduler, it is asked for so long


class Known(msgspec.Struct, array_like=True):
    """A run or a study that is over. What filters look at can be read without decoding the rest."""

    id: str
    marks: int
    seen: float  # when it was first seen to be over
    settled: bool  # no scheduler need be asked any more
    state: str
    name: str
    owner: str | None
    backend: str
    created: float | None
    raw: msgspec.Raw  # the described run, MessagePack
    spans: list[tuple[str, float, float, int | None, float]]

    def described(self) -> Described:
        """As it was remembered."""
        found: Described = msgspec.msgpack.decode(self.raw)
        return found

    def timeline(self) -> list[Span]:
        """As it was remembered."""
        return [Span(*each) for each in self.spans]  # type: ignore[arg-type]


class _File(msgspec.Struct, array_like=True):
    version: str
    url: str
    known: list[Known]


class Memory:
    """What is known of the runs below one URL."""

    def __init__(self, url: str) -> None:
        self.url, self.known, self._changed = url, dict[str, Known](), False
        self._path = _path(url)
        if self._path is None:
            return
        try:
            read = msgspec.msgpack.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError):
            return  # none yet, or damaged, or of another format: everything is read anew
        if (read.version, read.url) == (_version(), url):
            self.known = {each.id: each for each in read.known}

    def valid(self, run_id: str, marks: int) -> Known | None:
        """What is known of a run that has so many marks."""
        known = self.known.get(run_id)
        return known if known is not None and known.marks == marks else None

    def learn(self, described: Described, spans: Iterable[Span], marks: int, certain: bool, now: float) -> None:
        """Remember a run that is over. ``certain``: its own records say so, not only its scheduler."""
        before = self.valid(described["id"], marks)
        seen = before.seen if before else now
        self._changed = True
        self.known[described["id"]] = Known(
            id=described["id"],
            marks=marks,
            seen=seen,
            settled=certain or now - seen > SETTLE_S,
            state=described["state"],
            name=described["name"],
            owner=described["owner"],
            backend=described["backend"],
            created=described["created"],
            raw=msgspec.Raw(msgspec.msgpack.encode(described)),
            spans=[(each.kind, each.start, each.end, each.attempt, each.stall_s) for each in spans],
        )

    def forget(self, run_ids: Iterable[str]) -> None:
        """Runs that are not over any more, or that are gone."""
        for run_id in run_ids:
            self._changed |= self.known.pop(run_id, None) is not None

    def save(self) -> None:
        """Write what has changed. A disk that is full or read-only only means that it is read anew next time."""
        if not self._changed or self._path is None:
            return
        data = msgspec.msgpack.encode(_File(_version(), self.url, list(self.known.values())))
        aside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.touch(mode=0o600)
            aside.write_bytes(data)
            aside.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        self._changed = False


def _version() -> str:
    return f"{FORMAT}/{__version__}"


def _path(url: str) -> Path | None:
    """Beside the cache of compositions; None where there is no home. Apart for each user: some runs cannot be read."""
    beside = folder()
    if beside is None:
        return None
    return beside.with_name("status") / f"{hashlib.sha256(f'{os.getuid()} {url}'.encode()).hexdigest()[:24]}.msgpack"


ready(_File)
