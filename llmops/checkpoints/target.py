"""Which run directory, and what of it, a user means."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm.checkpoint.format import ROOT, CheckpointError, DamagedError
from llm.utils.storage import Storage
from llmops import api
from llmops.errors import ClusterError, UserError
from llmops.runs.model import Run
from llmops.runs.records import load_run
from llmops.runs.ssh_storage import open_storage
from llmops.runs.store import open_store

_INSIDE = re.compile(r"(?P<place>.+?)/(?P<commit>checkpoints/step_[0-9]{1,18}/[0-9]{1,18}-[0-9]{1,18})/*")
_SELECTOR = re.compile(r"(checkpoints/)?(step_)?[0-9]{1,18}/[0-9]{1,18}-[0-9]{1,18}|[^/]*")


@dataclass(frozen=True)
class Target:
    """A run directory, and what of it was named after the @."""

    run: Run
    storage: Storage
    selector: str | None

    @property
    def url(self) -> str:
        """Where it is."""
        return self.run.url


def resolve(ref: str, runs_url: str | None = None) -> Target:
    """The run directory that ``ref`` means: RUN or URL, with or without @STEP, @COMMIT or @TAG.

    RUN is looked up in the run store; what has a slash is a path or URL. That may also be of a checkpoint inside a run
    directory. Raises UserError for what is no run directory.
    """
    place, selector = _split(ref)
    if not _is_location(place):
        run = api.find(place, runs_url)
        return Target(run, open_storage(run.store), selector)
    run = load_run(open_store(place))
    storage = open_storage(run.store)
    with told(run.url):
        if run.record is None and not storage.list(ROOT):
            raise UserError(f"{run.url} is no run directory: it has neither run.json nor {ROOT}/")
    return Target(run, storage, selector)


def _split(ref: str) -> tuple[str, str | None]:
    if inside := _INSIDE.fullmatch(ref):
        return inside["place"], inside["commit"]
    place, at, selector = ref.rpartition("@")
    if not at or not _SELECTOR.fullmatch(selector) or (_is_location(ref) and _is_folder(ref)):
        return ref, None
    if not place or not selector:
        raise UserError(f"{ref}: write RUN@STEP, RUN@COMMIT or RUN@TAG")
    return place, selector


def _is_location(place: str) -> bool:
    return "/" in place or place in (".", "..") or place.startswith("~")


def _is_folder(place: str) -> bool:
    """Is this a folder, whose name happens to have an @?"""
    try:
        return Path(place).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, no such home directory, a zero byte
        return False


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Errors of checkpoints and of stores as those that the command line tells in one line."""
    try:
        yield
    except DamagedError as error:
        raise ClusterError(f"{url}: {error}") from error
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        kind = UserError if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else ClusterError
        raise kind(reason if url in reason else f"{url}: {reason}") from error
