"""All checkpoints of a run directory: what they are, what leads to what, and who holds them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llm.checkpoint import leases, retention, tags
from llm.checkpoint.format import MANIFEST, PARTS, ROOT, CheckpointError, Commit, Manifest
from llm.checkpoint.lineage import folders, read_manifest
from llmops import api
from llmops.checkpoints.target import Target, told
from llmops.errors import UserError

REQUESTS = 16  # at a time, for the small files that a survey reads
NEAREST = 3


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder. ``manifest`` is None where it is not committed, or where ``problem`` says what is wrong."""

    commit: Commit
    committed: bool
    bytes: int  # of what lies in the folder; the small manifests of the parts are not counted
    manifest: Manifest | None = None
    problem: str = ""
    tags: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)  # who holds a lease on it
    lineage: bool = False  # the newest commit, or the one that the newest attempt resumed from, descends from it
    latest: bool = False  # what the run would resume from

    @property
    def name(self) -> str:
        """As it may be given after the @."""
        return self.commit.path.removeprefix(f"{ROOT}/")

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers in its state."""
        return retention.metrics_of(self.manifest.state) if self.manifest else {}


class Survey:
    """The checkpoints as they were when they were looked at, sorted by step."""

    def __init__(self, target: Target) -> None:
        self.target, self.storage, self.run = target, target.storage, target.run
        with told(target.url), ThreadPoolExecutor(REQUESTS) as pool:
            looks = [look for look in pool.map(self._look, folders(self.storage)) if look is not None]
            held = leases.read_leases(self.storage)
            self.tags, self.unreadable_tags = tags.read_tags(self.storage)
        committed = {look.commit: look for look in looks if look.committed}
        latest = max(committed, default=None)
        self.resumed_from = self._resumed_from(latest)
        lineage = self._lineage(committed, latest)
        now = time.time()
        self.expired_leases = [each.path for each in held if each.expired(now)]
        self.lost_tags = sorted(name for name, commit in self.tags.items() if commit not in committed)
        self.entries = [
            replace(
                look,
                tags=sorted(name for name, commit in self.tags.items() if commit == look.commit),
                readers=sorted(each.by for each in held if each.commit == look.commit and not each.expired(now)),
                lineage=look.commit in lineage,
                latest=look.commit == latest,
            )
            for look in sorted(looks, key=lambda look: (look.commit.step, look.commit))
        ]

    @property
    def committed(self) -> list[Entry]:
        """Those that count, whether or not they can be read."""
        return [entry for entry in self.entries if entry.committed]

    @cached_property
    def live(self) -> set[int]:
        """The attempts, of those that have checkpoints, that may be at work. The scheduler is asked."""
        attempts = {entry.commit.attempt for entry in self.entries}
        if self.run.record is None and not self.run.attempts:  # nobody keeps records here
            return {max(attempts)} if attempts else set()
        now = api.status(self.run)
        if now.state in api.OVER:
            return set()
        newest = now.run.newest.number if now.run.newest else -1
        ended = {each.number for each in now.run.attempts if each.end is not None}
        return {attempt for attempt in attempts if attempt >= newest or attempt not in ended}

    def choose(self, selector: str | None, uncommitted: bool = False) -> Entry:
        """The checkpoint that a selector means; without one, the newest. Raises UserError that names the nearest."""
        entries = self.entries if uncommitted else self.committed
        if not entries:
            raise UserError(f"{self.target.url} has no committed checkpoints")
        if selector is None or selector == tags.LATEST:
            latest = next((entry for entry in entries if entry.latest), None)
            if latest is None:
                raise UserError(f"{self.target.url} has no committed checkpoints")
            return latest
        if selector.isdecimal() and selector.isascii() and len(selector) < 19:
            return self._by_step(int(selector), entries)
        return self._by_name(selector, entries) if "/" in selector else self._by_tag(selector, entries)

    def _by_step(self, step: int, entries: Sequence[Entry]) -> Entry:
        there = [entry for entry in entries if entry.commit.step == step]
        counting = [entry for entry in there if entry.lineage]
        if counting:
            return max(counting, key=lambda entry: entry.commit)
        if len(there) == 1:
            return there[0]
        if there:
            raise UserError(f"step {step} means {len(there)} checkpoints: {', '.join(entry.name for entry in there)}")
        near = sorted({entry.commit.step for entry in entries}, key=lambda each: abs(each - step))[:NEAREST]
        nearest = ", ".join(str(each) for each in sorted(near))
        raise UserError(f"{self.target.url} has no checkpoint of step {step}; the nearest: {nearest}")

    def _by_name(self, selector: str, entries: Sequence[Entry]) -> Entry:
        number, _, name = selector.removeprefix(f"{ROOT}/").removeprefix("step_").partition("/")
        for entry in entries:
            if int(number) == entry.commit.step and name == entry.name.partition("/")[2]:
                return entry
        near = sorted(entries, key=lambda entry: abs(entry.commit.step - int(number)))[:NEAREST]
        nearest = ", ".join(entry.name for entry in near)
        raise UserError(f"{self.target.url} has no checkpoint {selector}; the nearest: {nearest}")

    def _by_tag(self, selector: str, entries: Sequence[Entry]) -> Entry:
        if selector not in self.tags:
            known = f"its tags: {', '.join(sorted(self.tags))}" if self.tags else "it has none"
            raise UserError(f"{self.target.url} has no tag {selector}; {known}; `llmops ckpt ls` lists its steps")
        for entry in entries:
            if entry.commit == self.tags[selector]:
                return entry
        raise UserError(f"{selector} names {self.tags[selector].path}, which is gone from {self.target.url}")

    def _look(self, commit: Commit) -> Entry | None:
        sizes = self.storage.sizes(commit.path)
        if all(size is None for size in sizes.values()) and not self.storage.list(f"{commit.path}/{PARTS}"):
            return None  # some stores go on listing a folder after all that was in it is gone
        size = sum(size or 0 for size in sizes.values())
        if MANIFEST not in sizes:
            return Entry(commit, False, size)
        try:
            return Entry(commit, True, size, read_manifest(self.storage, commit))
        except CheckpointError as error:
            return Entry(commit, True, size, None, str(error).removeprefix(f"{commit.path}/"))

    def _resumed_from(self, latest: Commit | None) -> Commit | None:
        """The commit that the newest attempt began with, as long as it has not committed anything itself."""
        newest = self.run.newest
        if newest is None or (latest is not None and latest.attempt >= newest.number):
            return None
        try:
            return Commit.parse(newest.start.resume_from or "")
        except CheckpointError:  # from scratch
            return None

    def _lineage(self, committed: dict[Commit, Entry], latest: Commit | None) -> set[Commit]:
        parents: dict[Commit, Commit | None] = {}
        for commit, look in committed.items():
            if look.manifest is not None:
                parent = look.manifest.parent
                parents[commit] = None if parent is None else Commit.parse(parent)
        unreadable = committed.keys() - parents.keys()
        heads = [head for head in (latest, self.resumed_from) if head is not None and head in committed]
        return {commit for head in heads for commit in retention.lineage(parents, head, unreadable)}


def describe(survey: Survey) -> list[dict[str, Any]]:
    """The stable JSON objects of ``llmops ckpt ls --json``, one a checkpoint. Keys are added over time, never renamed.

    Strings are as they were written: escape them before they reach a terminal.
    """
    return [describe_entry(survey, entry) for entry in survey.entries]


def describe_entry(survey: Survey, entry: Entry) -> dict[str, Any]:
    """One of them. ``state`` is committed, unreadable, unfinished (its attempt may be at work) or debris."""
    commit, manifest = entry.commit, entry.manifest
    if entry.committed:
        state = "committed" if manifest else "unreadable"
    else:
        state = "unfinished" if commit.attempt in survey.live else "debris"
    return {
        "path": commit.path,
        "step": commit.step,
        "attempt": commit.attempt,
        "generation": commit.generation,
        "state": state,
        "problem": entry.problem,
        "latest": entry.latest,
        "lineage": entry.lineage,
        "tags": entry.tags,
        "readers": entry.readers,
        "bytes": manifest.bytes if manifest else entry.bytes,
        "time": manifest.time if manifest else None,
        "seconds": manifest.seconds if manifest else None,
        "world_size": manifest.world_size if manifest else None,
        "mesh": manifest.mesh if manifest else None,
        "parent": manifest.parent if manifest else None,
        "code": manifest.code if manifest else None,
        "metrics": entry.metrics,
    }
