"""Compositions that were made before, so that the same run is composed once.

Entries are one file each: a digest of the rest, the data as JSON, the text. A damaged entry counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmops.cache_dir import cache_dir

KEEP = 200  # entries
_SUFFIX = ".cfg"


def folder() -> Path | None:
    """A folder of :func:`llmops.cache_dir.cache_dir`."""
    shared = cache_dir()
    return shared / "config" if shared else None


def digest(parts: Iterable[tuple[str, bytes]], overrides: Sequence[str]) -> str:
    """Key of a composition: named contents that it depends on, in a fixed order, and its overrides."""
    total = hashlib.sha256()
    for name, content in parts:
        total.update(b"%d %d\n" % (len(name.encode()), len(content)) + name.encode() + content)
    total.update(msgspec.json.encode(overrides))
    return total.hexdigest()


def load(key: str) -> tuple[dict[str, Any], str] | None:
    """The data and the text that :func:`save` got, or ``None``."""
    target = folder()
    if target is None:
        return None
    try:
        content = (target / f"{key}{_SUFFIX}").read_bytes()
    except OSError:
        return None  # absent, or a cache that cannot be read: compose
    check, _, rest = content.partition(b"\n")
    if check.decode("ascii", "replace") != hashlib.sha256(rest).hexdigest():
        return None
    data, _, text = rest.partition(b"\n")
    return msgspec.json.decode(data), text.decode()


def save(key: str, data: dict[str, Any], text: str) -> None:
    """Remember a composition. A full or read-only disk only means that the next one is composed again."""
    rest = msgspec.json.encode(data) + b"\n" + text.encode()
    content = hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest
    target = folder()
    if target is None:
        return
    with contextlib.suppress(OSError):
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = target / f".{key[:16]}.{os.urandom(4).hex()}"
        try:
            aside.write_bytes(content)
            aside.replace(target / f"{key}{_SUFFIX}")
        finally:
            aside.unlink(missing_ok=True)
        _prune(target)


def _prune(target: Path) -> None:
    entries = [entry for entry in os.scandir(target) if entry.name.endswith(_SUFFIX)]
    if len(entries) <= KEEP:
        return
    entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
    for entry in entries[:-KEEP]:
        Path(entry.path).unlink(missing_ok=True)
