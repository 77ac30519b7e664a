"""Names for checkpoints: ``tags/<name>.json`` in the run directory. What is tagged stays until the tag is deleted."""

from __future__ import annotations

import re
import time

import msgspec

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import is_committed
from llm.utils.storage import Storage
from llm.utils.structs import ready

FOLDER = "tags"
LATEST = "latest"  # not a tag: the newest commit of the lineage
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tag(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a tag's file."""

    commit: str
    time: float  # epoch seconds
    by: str = ""


def check_name(name: str) -> str:
    """The name itself. Raises CheckpointError for one that cannot be a tag: a number means a step."""
    if not _NAME.fullmatch(name) or name.isdecimal() or name == LATEST:
        raise CheckpointError(
            f"{name!r} cannot be a tag: use 1 to 64 letters, digits, dots, dashes and underscores, "
            f"not digits alone, and not {LATEST!r}"
        )
    return name


def add_tag(storage: Storage, commit: Commit, name: str, by: str = "") -> None:
    """Tag a commit; that it has this tag already is fine. Raises CheckpointError when the name means another commit,
    or when the commit is gone.
    """
    path = _path(check_name(name))
    try:
        storage.create(path, msgspec.json.encode(Tag(commit=commit.path, time=time.time(), by=by)))
    except FileExistsError:
        other = _read(storage, name)
        if other != commit:
            what = "can no longer be read" if other is None else f"is {other.path}"
            raise CheckpointError(f"{name} {what}: delete that tag first, or choose another name") from None
    # Whoever removes commits takes the manifest away first and looks for tags then: one of the two sees the other.
    if not is_committed(storage, commit):
        storage.remove(path)
        raise CheckpointError(f"{commit.path} is not, or no longer, committed in {storage.url}; it was not tagged")


def delete_tag(storage: Storage, name: str) -> None:
    """Remove a tag, readable or not. Raises CheckpointError when there is none."""
    if f"{check_name(name)}.json" not in storage.list(FOLDER):
        raise CheckpointError(f"there is no tag {name} in {storage.url}")
    storage.remove(_path(name))


def read_tags(storage: Storage) -> tuple[dict[str, Commit], list[str]]:
    """Tag -> commit, and the paths of tags that cannot be read. The commits may be gone."""
    found: dict[str, Commit] = {}
    unreadable: list[str] = []
    for file in storage.list(FOLDER):
        name = file.removesuffix(".json")
        if name == file or not _NAME.fullmatch(name):  # not ours
            continue
        try:
            commit = _read(storage, name)
        except FileNotFoundError:  # deleted a moment ago
            continue
        if commit is None:
            unreadable.append(_path(name))
        else:
            found[name] = commit
    return found, unreadable


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _read(storage: Storage, name: str) -> Commit | None:
    try:
        return Commit.parse(msgspec.json.decode(storage.read(_path(name)), type=Tag).commit)
    except (msgspec.MsgspecError, UnicodeDecodeError, CheckpointError):
        return None


ready(Tag)
