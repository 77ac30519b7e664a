"""Which snapshot to commit after ranks have died: the newest that every rank's writer still holds.

Writers agree through the store, since nothing else of the attempt is left: each puts what it holds into
``rescue/<attempt>/<rank>.json``, and waits until all have. A node that is gone never does, and then nothing is rescued.
"""

from __future__ import annotations

import time

import msgspec

from llm.checkpoint.format import CheckpointError, Commit
from llm.checkpoint.lineage import newest_commit
from llm.utils.storage import Storage

POLL_S, POLL_MAX_S = 0.01, 0.5


def agree(storage: Storage, rank: int, world_size: int, held: list[Commit], limit_s: float) -> Commit | None:
    """The newest of ``held`` that all ranks hold; None when there is none, or when it is committed already.

    Raises CheckpointError when a rank does not tell within ``limit_s`` seconds, OSError when the store does not answer.
    """
    folder = f"rescue/{held[0].attempt:04d}"
    storage.create(f"{folder}/{rank:05d}.json", msgspec.json.encode([commit.path for commit in held]))
    until, pause = time.monotonic() + limit_s, POLL_S
    while len(names := [name for name in storage.list(folder) if name.endswith(".json")]) < world_size:
        if time.monotonic() > until:
            raise CheckpointError(f"only {len(names)} of {world_size} ranks can be rescued: the others do not answer")
        time.sleep(pause)
        pause = min(2 * pause, POLL_MAX_S)
    common = set(held)
    for name in names:
        paths = msgspec.json.decode(storage.read(f"{folder}/{name}"), type=list[str])
        common &= {Commit.parse(path) for path in paths}
    newest = newest_commit(storage)
    best = max(common, default=None)
    return None if best is None or (newest is not None and newest >= best) else best
