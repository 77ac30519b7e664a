"""Names of runs and studies for completion.

A folder is looked at: names never change, so that only new runs are read. An object store may take seconds: its names
are those of the last look, and a TAB has them looked up anew in the background. Paths are spelled out here since
importing what knows them takes longer than a TAB may.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llmops.cli import complete_index
from llmops.runs import ids

NEWEST = 500  # runs of which names are offered
LOOK_S = 30  # that a look at an object store may take
AGAIN_S = 5  # between two looks at one


def names(kind: str, runs_url: str | None, current: str) -> list[tuple[str, str]]:
    """Names, newest first, each with the id of its newest run; ids where no name begins with ``current``.

    ``kind``: ``run``, ``study`` or ``any``.
    """
    known = known_names(runs_url)
    if known is None:
        return []
    chosen = [(each, name) for each, name in known.items() if _is(kind, each)]
    chosen.sort(reverse=True)
    found: dict[str, str] = {}
    for each, name in chosen:
        found.setdefault(name, each)
    if current and not any(name.startswith(current) for name in found):
        return [(each, name) for each, name in chosen]
    return list(found.items())


def known_names(runs_url: str | None) -> dict[str, str] | None:
    """Id -> name of the newest runs and studies of a store; None where there is no such store."""
    from llmops.runs.store import default_runs_url

    url = runs_url or default_runs_url()
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    remote = "://" in url
    if not remote:
        url = os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111 - without a home, too
    path = _path(url)
    before: dict[str, str] = (path and complete_index.read(path)) or {}
    if remote:
        if path:
            _look_in_background(url, path.with_suffix(".asked"))
        return before
    try:
        listed = os.listdir(url)  # noqa: PTH208
    except OSError:
        return None
    newest = _newest(listed)
    now = {each: before.get(each) or _read(Path(url, each)) or "" for each in newest}
    now = {each: name for each, name in now.items() if name}
    if path and now != before:
        complete_index.write(path, now)
    return now


def _look_in_background(url: str, asked: Path) -> None:
    """Start a process that looks, unless one was started a moment ago."""
    import subprocess
    import time

    try:
        if time.time() - asked.stat().st_mtime < AGAIN_S:
            return
    except FileNotFoundError:
        pass
    complete_index.write(asked, {})
    subprocess.Popen(
        [sys.executable, "-m", "llmops.cli.complete_names", url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _path(url: str) -> Path | None:
    import hashlib

    folder = complete_index.folder()
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.json" if folder else None


def _newest(listed: list[str]) -> list[str]:
    return sorted((each for each in listed if ids.RUN.fullmatch(each) or ids.STUDY.fullmatch(each)), reverse=True)[
        :NEWEST
    ]


def _is(kind: str, each: str) -> bool:
    return kind == "any" or (ids.STUDY.fullmatch(each) is not None) == (kind == "study")


def _read(folder: Path) -> str | None:
    record = "study.json" if ids.STUDY.fullmatch(folder.name) else "run.json"
    try:
        name = json.loads((folder / record).read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is being made, or damaged; `llmops status` tells
    return name if isinstance(name, str) and name.isprintable() else None


def look(url: str) -> None:
    """Look at an object store and keep the names of what is there."""
    from llmops.runs import records
    from llmops.runs.store import open_store

    store, path = open_store(url), _path(url)
    if path is None:
        return
    before = complete_index.read(path) or {}
    newest = _newest(store.list())
    new = [each for each in newest if each not in before]
    files = [f"{each}/{'study' if ids.STUDY.fullmatch(each) else 'run'}.json" for each in new]
    read = {
        each: str(json.loads(text)["name"])
        for each, text in zip(new, records.read_many(store, files), strict=True)
        if text is not None
    }
    complete_index.write(
        path, {each: before.get(each) or read[each] for each in newest if each in before or each in read}
    )


if __name__ == "__main__":
    import signal

    signal.alarm(LOOK_S)
    look(sys.argv[1])
