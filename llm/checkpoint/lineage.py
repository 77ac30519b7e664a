"""Which checkpoints a run directory has, and which of them lead to which."""

from __future__ import annotations

import json

from llm.checkpoint.format import (
    MANIFEST,
    ROOT,
    CheckpointError,
    Commit,
    DamagedError,
    Manifest,
    PartManifest,
    open_manifest,
    open_part,
    part_name,
)
from llm.utils.storage import Storage


def read_manifest(storage: Storage, commit: Commit) -> Manifest:
    """The manifest of a commit. Raises DamagedError when it is missing or is not what was committed."""
    path = f"{commit.path}/{MANIFEST}"
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise DamagedError(f"{path} does not exist in {storage.url}: this checkpoint was never committed") from None
    return open_manifest(data, commit)


def read_part(storage: Storage, commit: Commit, manifest: Manifest, rank: int) -> PartManifest:
    """What ``rank`` saved. Raises DamagedError when it is missing or is not what was committed."""
    entry = manifest.parts[rank]
    path = f"{commit.path}/{part_name(rank, entry.bytes, entry.sha256)}"
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing from a committed checkpoint") from None
    return open_part(data, commit, rank, entry)


def folders(storage: Storage) -> list[Commit]:
    """Every checkpoint folder, committed or not, in the order of Commit: the one to resume from comes last."""
    found = []
    for step in storage.list(ROOT):
        for name in storage.list(f"{ROOT}/{step}"):
            try:
                found.append(Commit.parse(f"{ROOT}/{step}/{name}"))
            except CheckpointError:  # not ours
                continue
    return sorted(found)


def is_committed(storage: Storage, commit: Commit) -> bool:
    """Is there a manifest?"""
    return MANIFEST in storage.list(commit.path)


def commits(storage: Storage) -> list[Commit]:
    """Every committed checkpoint, in the order of Commit."""
    return [commit for commit in folders(storage) if is_committed(storage, commit)]


def newest_commit(storage: Storage) -> Commit | None:
    """The commit to resume from: the last of the newest attempt that committed anything."""
    return next((commit for commit in reversed(folders(storage)) if is_committed(storage, commit)), None)


def before(storage: Storage, commit: Commit) -> Commit | None:
    """The commit that ``commit`` descends from, or None; works also when ``commit`` itself is damaged.

    Its own manifest says so. If that cannot be trusted: the one before it of the same attempt, or else the one that the
    attempt resumed from, as its supervisor wrote down.
    """
    try:
        parent = read_manifest(storage, commit).parent
        return None if parent is None else Commit.parse(parent)
    except CheckpointError:
        pass
    mine = [each for each in commits(storage) if each.attempt == commit.attempt and each < commit]
    if mine:
        return mine[-1]
    try:
        start = json.loads(storage.read(f"attempts/{commit.attempt:04d}/start.json"))
        return Commit.parse(start["resume_from"]) if start["resume_from"] else None
    except FileNotFoundError:  # no supervisor: whoever trained followed the order of Commit
        return next((each for each in reversed(commits(storage)) if each.attempt < commit.attempt), None)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"attempts/{commit.attempt:04d}/start.json cannot be read: {error}") from error


def delete(storage: Storage, commit: Commit) -> None:
    """Remove a checkpoint: first the manifest, so that nobody ever sees a commit whose data is gone."""
    storage.remove(f"{commit.path}/{MANIFEST}")
    storage.remove_folder(commit.path)
    storage.remove_folder(f"{ROOT}/step_{commit.step:08d}", only_empty=True)
