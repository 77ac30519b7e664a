"""Which checkpoints stay, and how the others go."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from llm.checkpoint.format import MANIFEST, CheckpointError, Commit
from llm.checkpoint.leases import leased
from llm.checkpoint.lineage import commits, delete, read_manifest
from llm.checkpoint.tags import read_tags
from llm.utils.storage import Storage

ATTEMPTS = "attempts"  # the run directory's record of who has started


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """What of a lineage is kept: whatever any of the rules wants. Without a rule, everything."""

    keep_last: int | None = None  # the newest so many
    keep_every: int | None = None  # steps that this divides
    keep_best: str | None = None  # METRIC:min or METRIC:max

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.keep_best is not None:
            metric, _, order = self.keep_best.rpartition(":")
            if not metric or order not in ("min", "max"):
                raise ValueError(f"keep_best is {self.keep_best!r}: write METRIC:min or METRIC:max, such as loss:min")


class CommitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A commit, and what it is judged by."""

    commit: Commit
    metrics: dict[str, float] = {}


def metrics_of(state: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in a manifest's state, by dotted name; those under ``metrics`` also without that word."""
    found: dict[str, float] = {}

    def collect(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(f"{prefix}{name}.", value)
            elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found[f"{prefix}{name}"] = float(value)

    collect("", state)
    if isinstance(metrics := state.get("metrics"), dict):
        collect("", metrics)
    return found


def plan(commits: Iterable[CommitInfo], keep: Retention, protected: Collection[Commit]) -> list[Commit]:
    """What to remove of one lineage, oldest first. Never the newest commit, nor one that is ``protected``."""
    ordered = sorted(commits, key=lambda each: each.commit)
    if not ordered or keep == Retention():
        return []
    kept = {ordered[-1].commit, *protected}
    if keep.keep_last is not None:
        kept.update(each.commit for each in ordered[-keep.keep_last :])
    if keep.keep_every is not None:
        kept.update(each.commit for each in ordered if each.commit.step % keep.keep_every == 0)
    if keep.keep_best is not None:
        metric, _, order = keep.keep_best.rpartition(":")
        sign = 1 if order == "max" else -1
        having = [each for each in ordered if metric in each.metrics]
        if having:  # of equal ones the newest
            kept.add(max(having, key=lambda each: (sign * each.metrics[metric], each.commit)).commit)
    return [each.commit for each in ordered if each.commit not in kept]


def lineage(parents: Mapping[Commit, Commit | None], head: Commit, unreadable: Collection[Commit] = ()) -> set[Commit]:
    """Those of the existing commits that ``head`` descends from, itself included; rather too many than too few.

    ``parents`` has the commits whose manifests can be read; those of ``unreadable`` exist too. Where a parent has been
    removed, what lay before it is told from names: commits of one attempt and generation follow each other, and what
    goes back behind them goes back to something that they descend from.
    """
    existing = {*parents, *unreadable}
    found: set[Commit] = set()
    current: Commit | None = head
    while current is not None:
        if current in existing:
            found.add(current)
        if current in parents:
            current = parents[current]
            continue
        # A gap. What the same attempt and generation saved just before knows how it goes on.
        before = [each for each in existing if _family(each) == _family(current) and each.step < current.step]
        if before:
            current = max(before)
            continue
        found.update(each for each in existing if _family(each) < _family(current) and each.step <= current.step)
        break
    return found


def chain(storage: Storage, head: Commit) -> list[Commit]:
    """The commits in the store that ``head`` descends from, oldest first, ``head`` last."""
    parents: dict[Commit, Commit | None] = {}
    unreadable: set[Commit] = set()
    for commit in commits(storage):
        try:
            parent = read_manifest(storage, commit).parent
            parents[commit] = None if parent is None else Commit.parse(parent)
        except CheckpointError:  # damaged, of another version, or removed in between
            unreadable.add(commit)
    return sorted(lineage(parents, head, unreadable) | {head})


def _family(commit: Commit) -> tuple[int, int]:
    return commit.attempt, commit.generation


def held(storage: Storage) -> set[Commit]:
    """What is tagged or being read. Raises CheckpointError for a tag that cannot be read: it may mean any commit."""
    tags, unreadable = read_tags(storage)
    if unreadable:
        raise CheckpointError(f"{unreadable[0]} cannot be read, so nothing is removed: delete that tag")
    return leased(storage) | set(tags.values())


def remove(storage: Storage, commit: Commit, force: bool = False) -> bool:
    """Delete a checkpoint, committed or not: its manifest, then its data. False, and nothing changes, where it was
    tagged, or somebody began to read it, since the caller looked at :func:`held`; ``force`` does not ask.

    A reader writes its lease and looks for the manifest then; here it is the other way round: one sees the other.
    """
    path = f"{commit.path}/{MANIFEST}"
    if not force:
        try:
            sealed = storage.read(path)
        except FileNotFoundError:
            sealed = b""
        storage.remove(path)
        if commit in held(storage):
            if sealed:
                storage.create(path, sealed)
            return False
    delete(storage, commit)
    return True


def apply(storage: Storage, chain: Sequence[Commit], keep: Retention) -> list[Commit]:
    """For the attempt that has just committed the last of ``chain``: remove what ``keep`` does not want of it.

    Returns what is left. Nothing goes once a newer attempt has started, since that one may build on any of it. Raises
    OSError or CheckpointError when something could not be removed; to try again later is safe.
    """
    infos = [_info(storage, each, keep) for each in chain]
    if not plan(infos, keep, ()):  # nothing to ask the store about
        return list(chain)
    removed: set[Commit] = set()
    for commit in plan(infos, keep, held(storage)):
        if _superseded(storage, chain[-1].attempt):
            break
        if remove(storage, commit):
            removed.add(commit)
    return [commit for commit in chain if commit not in removed]


def _info(storage: Storage, commit: Commit, keep: Retention) -> CommitInfo:
    if keep.keep_best is None:
        return CommitInfo(commit=commit)
    try:
        return CommitInfo(commit=commit, metrics=metrics_of(read_manifest(storage, commit).state))
    except CheckpointError:  # gone, or damaged: it is not the best of anything
        return CommitInfo(commit=commit)


def _superseded(storage: Storage, attempt: int) -> bool:
    return any(name.isdecimal() and int(name) > attempt for name in storage.list(ATTEMPTS))
