"""What changes a run directory's checkpoints: removing, tagging, and leases while one is read."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from llm.checkpoint import leases, retention, tags
from llm.checkpoint.format import Commit
from llm.checkpoint.lineage import is_committed
from llm.checkpoint.retention import CommitInfo, Retention
from llm.checkpoint.verify import Report
from llm.checkpoint.verify import verify as read_all
from llm.utils.storage import Storage
from llmops.checkpoints.survey import Entry, Survey
from llmops.checkpoints.target import Target, told
from llmops.errors import UserError
from llmops.runs.records import whoami


@dataclass(frozen=True)
class Removal:
    """A checkpoint that may go, and why."""

    entry: Entry
    why: str


def plan_gc(survey: Survey, keep: Retention) -> list[Removal]:
    """What may go: what ``keep`` does not want of the lineage, what is not on it, and what was never committed.

    Never the newest commit, what the newest attempt resumed from, the files of an attempt that may be at work, what is
    tagged or being read, and what this version cannot read.
    """
    if survey.unreadable_tags:
        path = f"{survey.target.url}/{survey.unreadable_tags[0]}"
        raise UserError(f"{path} cannot be read, so nothing is removed; `llmops ckpt tag --delete` removes the tag")
    spared = {entry.commit for entry in survey.entries if held(survey, entry)}
    infos = [
        CommitInfo(commit=entry.commit, metrics=entry.metrics)
        for entry in survey.committed
        if entry.lineage and entry.manifest is not None
    ]
    unwanted = set(retention.plan(infos, keep, spared))
    removals = []
    for entry in survey.entries:
        if entry.commit in spared:
            continue
        if not entry.committed:
            removals.append(Removal(entry, "was never committed"))
        elif entry.commit in unwanted:
            removals.append(Removal(entry, "no rule keeps it"))
        elif not entry.lineage and entry.manifest is not None:
            removals.append(Removal(entry, "is not on the lineage"))
    return removals


def held(survey: Survey, entry: Entry) -> str | None:
    """What speaks against removing this checkpoint, if anything does."""
    if entry.latest:
        return "is the newest commit, which the run resumes from"
    if entry.tags:
        return f"is tagged {', '.join(entry.tags)}"
    if entry.readers:
        return f"is being read by {', '.join(entry.readers)}"
    if entry.commit == survey.resumed_from:
        return "is what the newest attempt resumed from"
    if entry.commit.attempt in survey.live:
        return f"belongs to attempt {entry.commit.attempt}, which may be at work"
    return None


def remove(survey: Survey, removals: Iterable[Removal], force: bool = False) -> Iterator[tuple[Removal, bool]]:
    """Remove one after the other; tells of each whether it went, or was tagged or read at the last moment.

    ``force`` removes those too, and their tags.
    """
    for removal in removals:
        with told(survey.target.url):
            if force:
                for name in removal.entry.tags:
                    tags.delete_tag(survey.storage, name)
            gone = retention.remove(survey.storage, removal.entry.commit, force)
        yield removal, gone


def remove_expired_leases(survey: Survey) -> None:
    """Remove what readers that died have left."""
    with told(survey.target.url):
        for path in survey.expired_leases:
            survey.storage.remove(path)


def add_tag(survey: Survey, entry: Entry, name: str) -> None:
    """Name a committed checkpoint."""
    with told(survey.target.url):
        tags.add_tag(survey.storage, entry.commit, name, whoami()[0])


def delete_tag(target: Target, name: str) -> None:
    """Take a name away."""
    with told(target.url):
        tags.delete_tag(target.storage, name)


def verify(target: Target, entry: Entry, progress: Callable[[int], None] | None = None) -> Report:
    """Read and check all of a checkpoint. Raises ClusterError where the store does not let it."""
    with told(target.url), reading(target.storage, entry.commit):
        return read_all(target.storage, entry.commit, progress)


def is_gone(target: Target, entry: Entry) -> bool:
    """Whether somebody has removed it since."""
    with told(target.url):
        return not is_committed(target.storage, entry.commit)


@contextlib.contextmanager
def reading(storage: Storage, commit: Commit) -> Iterator[None]:
    """Hold a lease on a checkpoint. In a store that may only be read there is none, and it may be removed meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(leases.lease(storage, commit))
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise
        yield
